#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "system/file.h"

namespace pepr {

// Numbers of fixed width, none missing: `rows` times `size` bytes at `data`.
struct ArrowColumn {
    const void* data;
    std::size_t size;
};

// One record batch as a message of an Arrow IPC stream, appended to `stream`. After Arrow's
// format/Message.fbs, little-endian; what begins a stream, its schema, is made by arrow.py.
void append_batch(std::string& stream, const std::vector<ArrowColumn>& columns, std::size_t rows);

// A stream on disk that never holds half a message. Functions return errno, 0 if they succeeded.
class ArrowFile {
public:
    // Throws std::system_error. The schema is written before the first message.
    ArrowFile(std::string path, std::string schema);

    // What cannot be written whole is cut off again.
    int append(const std::string& messages) noexcept;
    // Marks the end, as Arrow readers like it; a stream without rows stays empty.
    int finish() noexcept;
    // In the place of all that was appended, which has to be as much or more: it takes no room.
    int replace(const std::string& messages) noexcept;
    // Leaves the schema alone.
    int clear() noexcept;
    // Nothing can be appended any more.
    void close() noexcept;
    void remove() noexcept;
    // What the file system still takes of us, as far as it tells.
    std::size_t free_bytes() const noexcept;
    std::size_t size() const noexcept { return size_; }

private:
    int write(const std::string& data) noexcept;

    const std::string path_, schema_;
    File file_;
    std::size_t size_ = 0;
};

}  // namespace pepr
