// Writes Arrow IPC streams of plain numbers, to memory and to a file.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "system/file.h"

namespace pepr {

// Numbers of `size` bytes each, one for each row, at `data`; none is missing.
struct ArrowColumn {
    const void* data;
    std::size_t size;
};

// Appends one record batch to `stream`, as a message of an Arrow IPC stream (Arrow's
// format/Message.fbs, little-endian). arrow.py makes the schema, with which a stream begins.
void append_batch(std::string& stream, const std::vector<ArrowColumn>& columns, std::size_t rows);

// A stream on disk that never has half a message. Functions return 0 for success, else errno.
class ArrowFile {
public:
    // Throws std::system_error. The first append writes the schema first.
    ArrowFile(std::string path, std::string schema);

    // If not all of it can be written, truncates the file to what it was.
    int append(const std::string& messages) noexcept;
    // Writes the mark that ends a stream. A stream without rows stays an empty file.
    int finish() noexcept;
    // Writes over all that was appended, which must be as long or longer, so that it needs no
    // space.
    int replace(const std::string& messages) noexcept;
    // Removes all but the schema.
    int clear() noexcept;
    // Closes the file; nothing can be appended any more.
    void close() noexcept;
    void remove() noexcept;
    // Goes on in a new file, with a copy of what was appended. Returns an error, and changes
    // nothing, if it cannot write there; the new file begins empty if the old one cannot be read.
    int move_to(std::string path) noexcept;
    // The space that is left for us, as far as the file system knows.
    std::size_t free_bytes() const noexcept;
    std::size_t size() const noexcept { return size_; }

private:
    int write(const std::string& data) noexcept;
    // Opens the file anew if its descriptor was closed by somebody else, and is perhaps another
    // file by now. 0, or EBADF if it is gone.
    int recover() noexcept;

    std::string path_;
    const std::string schema_;
    File file_;
    std::size_t size_ = 0;
};

}  // namespace pepr
