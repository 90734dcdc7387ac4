#include "files.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>

#include "error.h"

namespace pq::runner {

bool is_file(const std::string& path) {
    struct stat status {};
    return stat(path.c_str(), &status) == 0 && S_ISREG(status.st_mode);
}

bool same_file(const std::string& a, const std::string& b) {
    struct stat one {}, other {};
    return stat(a.c_str(), &one) == 0 && stat(b.c_str(), &other) == 0 && one.st_dev == other.st_dev &&
           one.st_ino == other.st_ino;
}

std::string join(const std::string& directory, const std::string& name) {
    if (directory.empty() || name.rfind('/', 0) == 0) return name;
    return directory.back() == '/' ? directory + name : directory + "/" + name;
}

MappedFile::MappedFile(const std::string& path) {
    const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (file < 0) throw Error(std::string("the file cannot be opened (") + strerror(errno) + ")", path);
    struct stat status {};
    const bool regular = fstat(file, &status) == 0 && S_ISREG(status.st_mode);
    size_ = regular ? static_cast<size_t>(status.st_size) : 0;
    if (size_) data_ = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0);
    const int reason = errno;
    close(file);
    if (!regular) throw Error("not a file", path);
    if (data_ == MAP_FAILED) throw Error(std::string("the file cannot be read (") + strerror(reason) + ")", path);
}

MappedFile::~MappedFile() {
    if (data_) munmap(data_, size_);
}

std::string read_file(const std::string& path) {
    const MappedFile file(path);
    return file.size() ? std::string(static_cast<const char*>(file.data()), file.size()) : std::string();
}

Json read_json(const std::string& path) {
    const std::string text = read_file(path);
    try {
        return Json::parse(text);
    } catch (const Json::exception& error) {
        throw Error(std::string("the file is not JSON (") + error.what() + ")", path, "Copy the bundle again.");
    }
}

}  // namespace pq::runner
