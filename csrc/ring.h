#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <system_error>

#include <sys/mman.h>
#include <unistd.h>

namespace pepr {

// A ring of fixed-width rows in shared memory: one producer, any number of readers, each with a
// cursor of its own. The producer never waits: a reader that is lapped loses the oldest rows and
// learns how many. Rows are {t_ns, read_ns, value…}, every word 8 bytes.
//
// A seqlock over the whole ring. `reserved_` counts rows whose writing has begun, `head_` rows that
// are complete. Every data word is stored with release and loaded with acquire, so a reader that
// saw a word of row n + capacity also sees reserved_ > n and drops its copy of row n. This needs no
// fence (which ThreadSanitizer does not model) and is free on x86.
class Ring {
public:
    struct Columns {
        std::int64_t* t_ns;
        std::int64_t* read_ns;
        double* values;      // channel c of row r lies at values[c * stride + r]
        std::size_t stride;  // also the most rows that fit
    };

    Ring(std::size_t width, std::size_t min_rows) : width_(width) {
        while (capacity_ < min_rows) capacity_ *= 2;
        bytes_ = kHeaderBytes + capacity_ * row_words() * sizeof(Word);
        fd_ = ::memfd_create("pepr-ring", MFD_CLOEXEC);
        if (fd_ < 0) throw std::system_error(errno, std::generic_category(), "memfd_create");
        void* memory = MAP_FAILED;
        if (::ftruncate(fd_, static_cast<off_t>(bytes_)) == 0)
            memory = ::mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, fd_, 0);
        if (memory == MAP_FAILED) {
            const int error = errno;
            ::close(fd_);
            throw std::system_error(error, std::generic_category(), "mapping the sample ring");
        }
        header_ = new (memory) Header;
        words_ = reinterpret_cast<Word*>(static_cast<char*>(memory) + kHeaderBytes);
    }
    ~Ring() {
        ::munmap(header_, bytes_);
        ::close(fd_);
    }
    Ring(const Ring&) = delete;
    Ring& operator=(const Ring&) = delete;

    std::size_t width() const noexcept { return width_; }
    std::size_t capacity() const noexcept { return capacity_; }

    void push(std::int64_t t_ns, std::int64_t read_ns, const double* values) noexcept {
        const std::uint64_t n = header_->head.load(std::memory_order_relaxed);  // ours alone
        // Ordered before the data words, because those are release stores.
        header_->reserved.store(n + 1, std::memory_order_relaxed);
        Word* row = row_at(n);
        row[0].store(bits(t_ns), std::memory_order_release);
        row[1].store(bits(read_ns), std::memory_order_release);
        for (std::size_t c = 0; c < width_; ++c)
            row[2 + c].store(bits(values[c]), std::memory_order_release);
        header_->head.store(n + 1, std::memory_order_release);  // pairs with read()
    }

    // Copies rows from `cursor` on and moves it; adds rows overwritten before they were seen to
    // `lost`. Returns the number of rows copied, 0 when there is nothing new.
    std::size_t read(std::uint64_t& cursor, const Columns& out,
                     std::uint64_t& lost) const noexcept {
        const std::uint64_t head = header_->head.load(std::memory_order_acquire);
        if (head - cursor > capacity_) {
            lost += head - capacity_ - cursor;
            cursor = head - capacity_;
        }
        const std::size_t n = head - cursor < out.stride ? head - cursor : out.stride;
        for (std::size_t r = 0; r < n; ++r) {
            const Word* row = row_at(cursor + r);
            copy(out.t_ns + r, row[0]);
            copy(out.read_ns + r, row[1]);
            for (std::size_t c = 0; c < width_; ++c)
                copy(out.values + c * out.stride + r, row[2 + c]);
        }
        // Rows below reserved - capacity may have been overwritten while they were copied.
        const std::uint64_t reserved = header_->reserved.load(std::memory_order_acquire);
        std::size_t torn = 0;
        if (reserved > cursor + capacity_) torn = reserved - capacity_ - cursor;
        if (torn > n) torn = n;
        if (torn > 0) drop_front(out, n, torn);
        lost += torn;
        cursor += n;
        return n - torn;
    }

private:
    using Word = std::atomic<std::uint64_t>;
    static_assert(Word::is_always_lock_free && sizeof(Word) == 8);

    struct Header {
        alignas(64) std::atomic<std::uint64_t> reserved{0};
        alignas(64) std::atomic<std::uint64_t> head{0};
    };
    static constexpr std::size_t kHeaderBytes = 4096;

    template <typename T>
    static std::uint64_t bits(T value) noexcept {
        std::uint64_t word;
        std::memcpy(&word, &value, sizeof word);
        return word;
    }
    template <typename T>
    static void copy(T* to, const Word& from) noexcept {
        const std::uint64_t word = from.load(std::memory_order_acquire);
        std::memcpy(to, &word, sizeof word);
    }
    std::size_t row_words() const noexcept { return width_ + 2; }
    Word* row_at(std::uint64_t n) const noexcept {
        return words_ + (n & (capacity_ - 1)) * row_words();
    }
    void drop_front(const Columns& out, std::size_t rows, std::size_t count) const noexcept {
        const std::size_t keep = rows - count;
        std::memmove(out.t_ns, out.t_ns + count, keep * sizeof *out.t_ns);
        std::memmove(out.read_ns, out.read_ns + count, keep * sizeof *out.read_ns);
        for (std::size_t c = 0; c < width_; ++c) {
            double* column = out.values + c * out.stride;
            std::memmove(column, column + count, keep * sizeof *column);
        }
    }

    std::size_t width_;
    std::size_t capacity_ = 64;
    std::size_t bytes_ = 0;
    int fd_ = -1;
    Header* header_ = nullptr;
    Word* words_ = nullptr;
};

}  // namespace pepr
