// A ring of rows in shared memory, from one producer to readers in this and other processes.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "system/file.h"

namespace pepr {

// How a row's durations are stored: at most 4.3 s. A longer one shows in the times of the rows too.
inline std::uint32_t to_short_ns(std::int64_t ns) noexcept {
    return static_cast<std::uint32_t>(std::clamp<std::int64_t>(ns, 0, UINT32_MAX));
}

// Rows are {t_ns, read_ns, value…}, every word 8 bytes. Each reader has its own cursor. The
// producer never waits: a reader that is too slow loses the oldest rows and gets their number.
//
// The ring is one seqlock. `reserved` counts the rows whose writing has begun, `head` those that
// are complete. Every data word is stored with release and loaded with acquire. So a reader that
// saw a word of row n + capacity also sees reserved > n + capacity and drops its copy of row n.
// This needs no fence (which ThreadSanitizer does not model) and is free on x86.

// The reader's side, in the producer's process or in another one.
class RingView {
public:
    struct Columns {
        std::int64_t* t_ns;
        std::int64_t* read_ns;
        double* values;      // channel c of row r lies at values[c * stride + r]
        std::size_t stride;  // also the most rows that fit
    };

    // Maps read-only the ring of a descriptor that Ring::share() returned; the caller still owns
    // the descriptor. Throws std::invalid_argument for any other file. Nothing that the file's
    // owner does later can make the reader crash or read outside of the mapping.
    explicit RingView(int fd);
    ~RingView();
    RingView(const RingView&) = delete;
    RingView& operator=(const RingView&) = delete;

    std::size_t width() const noexcept { return width_; }
    std::size_t capacity() const noexcept { return capacity_; }
    std::uint64_t head() const noexcept { return header_->head.load(std::memory_order_acquire); }

    // Copies the rows from `cursor` on and moves the cursor. Adds to `lost` the number of rows that
    // were overwritten before. Returns the number of rows copied; 0: nothing is new.
    std::size_t read(std::uint64_t& cursor, const Columns& out, std::uint64_t& lost) const noexcept;

    // Copies the newest row, whatever has been read. Returns the number of rows: 1, or 0.
    std::size_t latest(const Columns& out) const noexcept;

    // The number of the last row that began at t_ns or before; of the oldest row there is if all
    // began later.
    std::uint64_t find(std::int64_t t_ns) const noexcept;

protected:
    using Word = std::atomic<std::uint64_t>;
    static_assert(Word::is_always_lock_free && sizeof(Word) == 8);

    struct Header {
        std::uint64_t magic, version, width, capacity;
        alignas(64) Word reserved;
        alignas(64) Word head;
    };
    static constexpr std::size_t kHeaderBytes = 4096;

    RingView() = default;
    void place(void* memory) noexcept {
        header_ = static_cast<Header*>(memory);
        words_ = reinterpret_cast<Word*>(static_cast<char*>(memory) + kHeaderBytes);
    }
    static std::size_t bytes_of(std::size_t width, std::size_t capacity) noexcept {
        return kHeaderBytes + capacity * (width + 2) * sizeof(Word);
    }
    Word* row_at(std::uint64_t n) const noexcept {
        return words_ + (n & (capacity_ - 1)) * (width_ + 2);
    }

    std::size_t width_ = 0;
    std::size_t capacity_ = 64;
    Header* header_ = nullptr;
    Word* words_ = nullptr;

private:
    void drop_front(const Columns& out, std::size_t rows, std::size_t count) const noexcept;
};

// The producer's side.
class Ring : public RingView {
public:
    Ring(std::size_t width, std::size_t min_rows);

    // A new descriptor for a reader in another process, which may not be trusted: opened for
    // reading, and sealed so that nobody can write to, grow or truncate the file through it. The
    // caller closes it. Throws std::system_error.
    int share() const;

    void push(std::int64_t t_ns, std::int64_t read_ns, const double* values) noexcept {
        const std::uint64_t n = header_->head.load(std::memory_order_relaxed);  // only we write it
        // Ordered before the data words, because those are release stores.
        header_->reserved.store(n + 1, std::memory_order_relaxed);
        Word* row = row_at(n);
        row[0].store(bits(t_ns), std::memory_order_release);
        row[1].store(bits(read_ns), std::memory_order_release);
        for (std::size_t c = 0; c < width_; ++c)
            row[2 + c].store(bits(values[c]), std::memory_order_release);
        header_->head.store(n + 1, std::memory_order_release);  // pairs with read()
    }

private:
    template <typename T>
    static std::uint64_t bits(T value) noexcept {
        std::uint64_t word;
        std::memcpy(&word, &value, sizeof word);
        return word;
    }

    File file_;
};

}  // namespace pepr
