// Reading files of a bundle.
#pragma once

#include <cstddef>
#include <nlohmann/json_fwd.hpp>
#include <string>

namespace pq::runner {

using Json = nlohmann::json;

bool is_file(const std::string& path);
// Whether both paths lead to one file that exists.
bool same_file(const std::string& a, const std::string& b);
// "directory/name"; `name` as it is where it is absolute or `directory` is empty.
std::string join(const std::string& directory, const std::string& name);

// A file's bytes in the address space, without a copy: engines have gigabytes. Error where it cannot be read.
class MappedFile {
public:
    explicit MappedFile(const std::string& path);
    ~MappedFile();
    MappedFile(const MappedFile&) = delete;
    MappedFile& operator=(const MappedFile&) = delete;

    const void* data() const { return data_; }
    size_t size() const { return size_; }

private:
    void* data_ = nullptr;  // null for an empty file
    size_t size_ = 0;
};

std::string read_file(const std::string& path);
// A JSON document; Error names the file and the place of the mistake.
Json read_json(const std::string& path);

}  // namespace pq::runner
