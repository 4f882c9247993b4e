// A file descriptor that closes itself, and the small files and directories of sysfs and procfs.
#pragma once

#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <set>
#include <string>
#include <system_error>
#include <utility>

#include <dirent.h>
#include <fcntl.h>
#include <linux/perf_event.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace pepr {

class File {
public:
    File() = default;
    explicit File(int fd) noexcept : fd_(fd) {}
    explicit File(const char* path, int flags = 0) noexcept
        : File(::open(path, O_RDONLY | O_CLOEXEC | flags)) {
        remember();
    }
    explicit File(const std::string& path) noexcept : File(path.c_str()) {}
    File(File&& other) noexcept { *this = std::move(other); }
    File& operator=(File&& other) noexcept {
        std::swap(fd_, other.fd_);
        std::swap(device_, other.device_);
        std::swap(inode_, other.inode_);
        return *this;
    }
    ~File() {
        if (is_ours()) ::close(fd_);
    }
    explicit operator bool() const noexcept { return fd_ >= 0; }
    int fd() const noexcept { return fd_; }
    // Remembers which file it is, so that a descriptor which the program has closed, and perhaps
    // got again for a file of its own, is not taken for it.
    void remember() noexcept { identify(fd_, device_, inode_); }
    bool is_ours() const noexcept {
        if (inode_ == 0) return fd_ >= 0;
        dev_t device = 0;
        ino_t inode = 0;
        identify(fd_, device, inode);
        return device == device_ && inode == inode_;
    }
    bool is_same(const File& other) const noexcept {
        return other.device_ == device_ && other.inode_ == inode_;
    }

    // Reads from the start, which makes sysfs and procfs compute a fresh value, and ends the text
    // with '\0'. Returns its length; 0 for any failure.
    std::size_t read(char* text, std::size_t size) const noexcept {
        const ssize_t n = ::pread(fd_, text, size - 1, 0);
        text[n > 0 ? n : 0] = '\0';
        return n > 0 ? static_cast<std::size_t>(n) : 0;
    }

private:
    static void identify(int fd, dev_t& device, ino_t& inode) noexcept {
        const int error = errno;  // that of the caller stays
        look(fd, device, inode);
        errno = error;
    }
    static void look(int fd, dev_t& device, ino_t& inode) noexcept {
        struct stat about{};
        if (::fstat(fd, &about) != 0) return;
        device = about.st_dev;
        inode = about.st_ino;
        if ((about.st_mode & S_IFMT) != 0) return;
        // All perf events, eventfds and the like are one inode; only the former have an id.
        std::uint64_t id = 0;
        inode = ::ioctl(fd, PERF_EVENT_IOC_ID, &id) == 0 ? id : 0;
    }

    int fd_ = -1;
    dev_t device_ = 0;
    ino_t inode_ = 0;
};

// The same file with a high descriptor, if there is one. Programs close descriptors that they do
// not know, and open files of their own: those get low numbers, and are not taken for ours.
inline File moved_up(File file) noexcept {
    // 212 below 512, up to where Linux makes the table at once. A second time it would wait for all
    // CPUs if there are threads (expand_fdtable of fs/file.c): 17 ms.
    constexpr int kHigh = 300;
    if (!file) return file;  // errno says why
    File high(::fcntl(file.fd(), F_DUPFD_CLOEXEC, kHigh));
    if (high) std::swap(file, high);
    file.remember();
    return file;
}

// The text of a small file, without its trailing newline; empty if it cannot be read. Anything but
// printable ASCII becomes '?', because names go into recordings as text.
inline std::string read_text(const std::string& path) {
    char text[512];
    std::string result(text, File(path).read(text, sizeof text));
    while (!result.empty() && (result.back() == '\n' || result.back() == ' ')) result.pop_back();
    for (char& c : result)
        if (c < ' ' || c > '~') c = '?';
    return result;
}

// Calls `visit` with each entry of an open directory. A DIR would close its descriptor even if the
// program has got it for a file of its own.
template <typename Visit>
void visit_entries(const File& directory, Visit visit) {
    alignas(dirent64) std::array<char, 2048> entries;
    for (long size = 0;
         (size = ::syscall(SYS_getdents64, directory.fd(), entries.data(), entries.size())) > 0;)
        for (long at = 0; at < size;) {
            const auto* const entry = reinterpret_cast<const dirent64*>(entries.data() + at);
            at += entry->d_reclen;
            visit(*entry);
        }
}

// The entries of a directory, sorted, so that channels have the same order in every run. Does not
// throw if the directory vanishes meanwhile; `error` says why the list is empty or incomplete.
inline std::set<std::filesystem::path> list_directory(const std::filesystem::path& directory,
                                                      std::error_code& error) {
    std::set<std::filesystem::path> paths;
    std::filesystem::directory_iterator entry(directory, error);
    for (const std::filesystem::directory_iterator end; !error && entry != end;
         entry.increment(error))
        paths.insert(entry->path());
    return paths;
}

inline bool is_denied(int error) noexcept { return error == EACCES || error == EPERM; }

}  // namespace pepr
