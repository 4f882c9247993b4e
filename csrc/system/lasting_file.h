// A small file of sysfs that outlives what the program does to our descriptors.
#pragma once

#include <cstddef>
#include <string>
#include <utility>

#include "system/file.h"

namespace pepr {

// A small file that is read again and again. If the program has closed our descriptor, or has got
// its number for a file of its own, it is opened anew: a foreign file's digits are no reading.
class LastingFile {
public:
    LastingFile() = default;
    explicit LastingFile(std::string path) : path_(std::move(path)), file_(open()) {}
    explicit operator bool() const noexcept { return static_cast<bool>(file_); }

    // As File::read.
    std::size_t read(char* text, std::size_t size) noexcept {
        if (!path_.empty() && !file_.is_ours()) {
            File again = open();
            if (!again.is_same(file_)) {
                text[0] = '\0';
                return 0;  // its path leads to another file by now
            }
            file_ = std::move(again);
        }
        return file_.read(text, size);
    }

private:
    File open() const noexcept { return moved_up(File(path_)); }

    std::string path_;
    File file_;
};

}  // namespace pepr
