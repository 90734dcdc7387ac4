// The one kind of error that a user sees: what, where, what to do; main() prints it as one line.
#pragma once

#include <stdexcept>
#include <string>

namespace pq::runner {

class Error : public std::runtime_error {
public:
    // "WHAT: WHERE. CURE"; `where` and `cure` may be empty. `cure` is a sentence with its full stop.
    explicit Error(const std::string& what, const std::string& where = "", const std::string& cure = "")
        : std::runtime_error(line(what, where, cure)) {}

private:
    static std::string line(const std::string& what, const std::string& where, const std::string& cure) {
        const std::string place = where.empty() ? "" : ": " + where;
        return what + place + (cure.empty() ? "" : ". " + cure);
    }
};

// A mistake on the command line: exit code 2, as the Python commands have it.
class UsageError : public Error {
public:
    using Error::Error;
};

}  // namespace pq::runner
