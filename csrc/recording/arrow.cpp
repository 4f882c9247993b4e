#include "recording/arrow.h"

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <system_error>
#include <utility>

#include <fcntl.h>
#include <sys/statvfs.h>
#include <unistd.h>

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
              "streams are little-endian, and memory has to be");

namespace pepr {

namespace {

// A message is this mark, the length of its metadata, the metadata and its body. A length of 0 ends
// the stream.
constexpr std::uint32_t kMark = 0xffffffff;
constexpr std::uint16_t kVersion = 4;     // MetadataVersion V5, of Arrow 1.0 and later
constexpr std::uint8_t kRecordBatch = 3;  // MessageHeader

template <typename T>
void put(std::string& to, T number) {
    to.append(reinterpret_cast<const char*>(&number), sizeof number);
}

template <typename T, typename... Numbers>
void put_all(std::string& to, Numbers... numbers) {
    (put(to, static_cast<T>(numbers)), ...);
}

constexpr std::size_t padded(std::size_t bytes) { return (bytes + 7) / 8 * 8; }

// Neither a planted link nor a FIFO is written to.
File make_file(const std::string& path) noexcept {
    constexpr int kFlags = O_RDWR | O_CREAT | O_TRUNC | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC;
    return moved_up(File(::open(path.c_str(), kFlags, 0644)));
}

// Writes all of it at a place, or returns errno.
int write_at(const File& file, const char* data, std::size_t bytes, std::size_t at) noexcept {
    while (bytes > 0) {
        const ssize_t n = ::pwrite(file.fd(), data, bytes, static_cast<off_t>(at));
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return n == 0 ? EIO : errno;
        data += n;
        at += static_cast<std::size_t>(n);
        bytes -= static_cast<std::size_t>(n);
    }
    return 0;
}

}  // namespace

void append_batch(std::string& stream, const std::vector<ArrowColumn>& columns, std::size_t rows) {
    const std::size_t count = columns.size();
    std::size_t body_bytes = 0;
    for (const ArrowColumn& column : columns) body_bytes += padded(rows * column.size);
    stream.reserve(stream.size() + 88 + 48 * count + body_bytes);
    // The metadata is a flatbuffer whose layout depends only on the number of columns, so its bytes
    // are written in order instead of building tables. Offsets are relative to their own position.
    put_all<std::uint32_t>(stream, kMark, 80 + 48 * count);
    put<std::uint32_t>(stream, 16);                        // offset of the root, a Message
    put_all<std::uint16_t>(stream, 12, 20, 16, 18, 4, 8);  // vtable of Message
    put_all<std::int32_t>(stream, 12, 28);                 // offsets of its vtable and its header
    put<std::int64_t>(stream, static_cast<std::int64_t>(body_bytes));
    put(stream, kVersion);
    put(stream, kRecordBatch);
    stream.append(1, '\0');
    put_all<std::uint16_t>(stream, 10, 20, 8, 4, 16);  // vtable of RecordBatch
    stream.append(2, '\0');
    put_all<std::int32_t>(stream, 12, 16);  // offsets of its vtable and its nodes
    put<std::int64_t>(stream, static_cast<std::int64_t>(rows));
    put_all<std::uint32_t>(stream, 12 + 16 * count, count);  // offset of buffers; nodes
    for (std::size_t c = 0; c < count; ++c) put_all<std::int64_t>(stream, rows, 0);
    stream.append(4, '\0');
    put<std::uint32_t>(stream, static_cast<std::uint32_t>(2 * count));
    std::size_t at = 0;
    for (const ArrowColumn& column : columns) {
        const std::size_t bytes = rows * column.size;
        put_all<std::int64_t>(stream, at, 0, at, bytes);  // of validity (empty: all); of numbers
        at += padded(bytes);
    }
    for (const ArrowColumn& column : columns) {
        const std::size_t bytes = rows * column.size;
        stream.append(static_cast<const char*>(column.data), bytes);
        stream.append(padded(bytes) - bytes, '\0');
    }
}

ArrowFile::ArrowFile(std::string path, std::string schema)
    : path_(std::move(path)), schema_(std::move(schema)), file_(make_file(path_)) {
    if (!file_) throw std::system_error(errno, std::generic_category(), path_);
}

void ArrowFile::close() noexcept { file_ = File(); }

int ArrowFile::recover() noexcept {
    if (file_.is_ours()) return 0;
    File again = moved_up(File(::open(path_.c_str(), O_RDWR | O_NOFOLLOW | O_CLOEXEC)));
    if (!again || !again.is_same(file_)) return EBADF;
    file_ = std::move(again);
    return 0;
}

int ArrowFile::append(const std::string& messages) noexcept {
    if (size_ == 0)
        if (const int error = write(schema_)) return error;
    return write(messages);
}

int ArrowFile::replace(const std::string& messages) noexcept {
    if (size_ < schema_.size() + messages.size()) return ENOSPC;
    if (const int error = recover()) return error;
    size_ = schema_.size();
    if (const int error = write(messages)) return error;
    return ::ftruncate(file_.fd(), static_cast<off_t>(size_)) == 0 ? 0 : errno;
}

int ArrowFile::finish() noexcept {
    if (size_ == 0) return 0;
    std::string end;
    put_all<std::uint32_t>(end, kMark, 0);
    return write(end);
}

int ArrowFile::clear() noexcept {
    const std::size_t left = size_ == 0 ? 0 : schema_.size();
    if (const int error = recover()) return error;
    if (::ftruncate(file_.fd(), static_cast<off_t>(left)) != 0) return errno;
    size_ = left;
    return 0;
}

int ArrowFile::move_to(std::string path) noexcept {
    File next = make_file(path);
    if (!next) return errno;
    char part[1 << 14];
    std::size_t copied = 0;
    for (bool readable = recover() == 0; readable && copied < size_;) {
        const std::size_t bytes = std::min(sizeof part, size_ - copied);
        const ssize_t n = ::pread(file_.fd(), part, bytes, static_cast<off_t>(copied));
        if (n < 0 && errno == EINTR) continue;
        readable = n > 0;
        if (!readable) break;
        if (const int error = write_at(next, part, static_cast<std::size_t>(n), copied))
            return error;
        copied += static_cast<std::size_t>(n);
    }
    if (copied < size_) {  // half a stream is none
        if (::ftruncate(next.fd(), 0) != 0) return errno;
        copied = 0;
    }
    file_ = std::move(next);
    path_ = std::move(path);
    size_ = copied;
    return 0;
}

void ArrowFile::remove() noexcept { ::unlink(path_.c_str()); }

std::size_t ArrowFile::free_bytes() const noexcept {
    struct statvfs about{};
    return ::fstatvfs(file_.fd(), &about) == 0 ? about.f_bavail * about.f_frsize : 0;
}

int ArrowFile::write(const std::string& data) noexcept {
    if (const int error = recover()) return error;
    if (const int error = write_at(file_, data.data(), data.size(), size_)) {
        (void)!::ftruncate(file_.fd(), static_cast<off_t>(size_));
        return error;
    }
    size_ += data.size();
    return 0;
}

}  // namespace pepr
