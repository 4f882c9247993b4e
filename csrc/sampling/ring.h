#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace pepr {

// A ring of fixed-width rows in shared memory: one producer, any number of readers, each with a
// cursor of its own. The producer never waits: a reader that is lapped loses the oldest rows and
// learns how many. Rows are {t_ns, read_ns, value…}, every word 8 bytes.
//
// A seqlock over the whole ring. `reserved` counts rows whose writing has begun, `head` rows that
// are complete. Every data word is stored with release and loaded with acquire, so a reader that
// saw a word of row n + capacity also sees reserved > n and drops its copy of row n. This needs no
// fence (which ThreadSanitizer does not model) and is free on x86.

// The reader's side, in the producer's process or in another.
class RingView {
public:
    struct Columns {
        std::int64_t* t_ns;
        std::int64_t* read_ns;
        double* values;      // channel c of row r lies at values[c * stride + r]
        std::size_t stride;  // also the most rows that fit
    };

    // Maps the ring behind a descriptor that Ring::share() gave, read-only; the descriptor stays
    // the caller's. Throws std::invalid_argument for anything else: whoever made it, nothing that
    // it does later makes a reader crash or leave the mapping.
    explicit RingView(int fd);
    ~RingView();
    RingView(const RingView&) = delete;
    RingView& operator=(const RingView&) = delete;

    std::size_t width() const noexcept { return width_; }
    std::size_t capacity() const noexcept { return capacity_; }
    std::uint64_t head() const noexcept { return header_->head.load(std::memory_order_acquire); }

    // Copies rows from `cursor` on and moves it; adds rows overwritten before they were seen to
    // `lost`. Returns the number of rows copied, 0 when there is nothing new.
    std::size_t read(std::uint64_t& cursor, const Columns& out, std::uint64_t& lost) const noexcept;

    // The newest row, seen by nobody's cursor; 0: there is none yet.
    std::size_t latest(const Columns& out) const noexcept;

    // The number of the last row that began at t_ns or before; the oldest one kept if all did
    // later.
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

// The producer's.
class Ring : public RingView {
public:
    Ring(std::size_t width, std::size_t min_rows);
    ~Ring();

    // A descriptor of its own for a reader in another process, who may not be trusted: opened for
    // reading, and sealed so that no way back to writing, growing or truncating is left to anybody.
    // The caller closes it. Throws std::system_error.
    int share() const;

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

private:
    template <typename T>
    static std::uint64_t bits(T value) noexcept {
        std::uint64_t word;
        std::memcpy(&word, &value, sizeof word);
        return word;
    }

    int fd_ = -1;
};

}  // namespace pepr
