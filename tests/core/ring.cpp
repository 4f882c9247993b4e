// The ring in shared memory: order, laps, torn rows, other processes.

#include <csignal>
#include <functional>

#include <sys/mman.h>
#include <sys/resource.h>

#include "core_test.h"
#include "sampling/ring.h"

namespace {

// Every word of row n follows from n alone, which shows a row that is made of two.
double value_of(std::int64_t n, std::size_t channel) {
    return static_cast<double>(n) * static_cast<double>(channel + 3);
}
std::int64_t read_ns_of(std::int64_t n) { return 7 * n + 1; }

class Producer {
public:
    explicit Producer(Ring& ring) : ring_(ring), row_(ring.width()) {}
    void push() {
        for (std::size_t c = 0; c < row_.size(); ++c) row_[c] = value_of(next_, c);
        ring_.push(next_, read_ns_of(next_), row_.data());
        ++next_;
    }
    void push(int rows) {
        for (int i = 0; i < rows; ++i) push();
    }

private:
    Ring& ring_;
    std::vector<double> row_;
    std::int64_t next_ = 0;
};

// A reader that checks every row it gets: whole, in order, with gaps exactly where rows were lost.
class Reader {
public:
    Reader(const RingView& ring, std::size_t stride)
        : ring_(ring),
          stride_(stride),
          t_ns_(stride),
          read_ns_(stride),
          values_(stride * ring.width()) {}

    std::size_t read() {
        const Ring::Columns columns{t_ns_.data(), read_ns_.data(), values_.data(), stride_};
        const std::size_t rows = ring_.read(cursor_, columns, lost);
        auto expected = static_cast<std::int64_t>(read_count + lost);
        for (std::size_t r = 0; r < rows; ++r, ++expected) {
            order_broken |= t_ns_[r] != expected;
            torn |= read_ns_[r] != read_ns_of(t_ns_[r]);
            for (std::size_t c = 0; c < ring_.width(); ++c)
                torn |= values_[c * stride_ + r] != value_of(t_ns_[r], c);
        }
        read_count += rows;
        return rows;
    }

    std::uint64_t read_count = 0, lost = 0;
    bool torn = false, order_broken = false;

private:
    const RingView& ring_;
    std::size_t stride_;
    std::vector<std::int64_t> t_ns_, read_ns_;
    std::vector<double> values_;
    std::uint64_t cursor_ = 0;
};

TEST(ring_keeps_order_in_batches) {
    Ring ring(3, 100);
    CHECK(ring.capacity() == 128);  // the next power of two
    Producer producer(ring);
    Reader reader(ring, 50);
    CHECK(reader.read() == 0);
    producer.push(120);
    CHECK(reader.read() == 50);
    CHECK(reader.read() == 50);
    CHECK(reader.read() == 20);
    CHECK(reader.read() == 0);
    CHECK(reader.lost == 0 && !reader.torn && !reader.order_broken);
}

TEST(ring_wraps_without_loss_for_a_reader_that_keeps_up) {
    Ring ring(2, 64);
    Producer producer(ring);
    Reader reader(ring, 64);
    for (int round = 0; round < 100; ++round) {
        producer.push(round % 65);  // up to the capacity itself
        while (reader.read() > 0) {
        }
    }
    CHECK(reader.lost == 0 && !reader.torn && !reader.order_broken);
    CHECK(reader.read_count == 65 * 64 / 2 + 35 * 34 / 2);
}

TEST(ring_counts_laps_exactly_for_each_reader) {
    Ring ring(1, 64);
    Producer producer(ring);
    Reader early(ring, 64), late(ring, 10);
    producer.push(40);
    CHECK(early.read() == 40);
    producer.push(3 * 64 + 5);
    CHECK(early.read() == 64);
    CHECK(early.lost == 2 * 64 + 5);
    while (late.read() > 0) {
    }
    CHECK(late.lost == 40 + 2 * 64 + 5);
    CHECK(late.read_count == 64);
    CHECK(!early.torn && !early.order_broken && !late.torn && !late.order_broken);
}

TEST(ring_without_channels_still_has_times) {
    Ring ring(0, 64);
    Producer producer(ring);
    Reader reader(ring, 64);
    producer.push(10);
    CHECK(reader.read() == 10);
    CHECK(!reader.order_broken && !reader.torn);
}

TEST(ring_gives_whole_rows_to_slow_readers_of_a_fast_producer) {
    constexpr int kRows = 400'000;
    Ring ring(5, 256);
    std::atomic<bool> done{false};
    struct Pace {
        std::size_t stride;
        int pause_us;
    };
    std::vector<std::thread> threads;
    for (const Pace pace : {Pace{1, 0}, {7, 0}, {256, 0}, {256, 200}, {4096, 2000}})
        threads.emplace_back([&ring, &done, pace] {
            Reader reader(ring, pace.stride);
            for (bool last = false; !last;) {
                last = done.load(std::memory_order_acquire);
                while (reader.read() > 0) {
                }
                if (pace.pause_us > 0)
                    std::this_thread::sleep_for(std::chrono::microseconds(pace.pause_us));
            }
            CHECK(!reader.torn);
            CHECK(!reader.order_broken);
            CHECK(reader.read_count + reader.lost == kRows);
            CHECK(reader.read_count >= 256);  // at the end the producer stands still
        });
    Producer producer(ring);
    producer.push(kRows);
    done.store(true, std::memory_order_release);
    for (std::thread& thread : threads) thread.join();
}

// A copy of a full ring takes long in wide rows; what the producer overwrites meanwhile is dropped
// from its front. A lapped read that returns less than a full ring has been there.
TEST(ring_drops_what_is_overwritten_during_a_copy) {
    constexpr std::size_t kRows = 64;
    Ring ring(300, kRows);
    std::atomic<bool> done{false};
    std::uint64_t pushed = 0;
    std::thread thread([&] {
        Producer producer(ring);
        for (; !done.load(std::memory_order_relaxed); ++pushed) producer.push();
    });
    Reader reader(ring, kRows);
    int dropped_in_part = 0;
    for (const std::int64_t end_ns = now_ns() + 20 * kNsPerS;
         dropped_in_part < 50 && now_ns() < end_ns;) {
        const std::uint64_t lost = reader.lost;
        const std::size_t rows = reader.read();
        if (reader.lost > lost && rows > 0 && rows < kRows) ++dropped_in_part;
        std::this_thread::yield();
    }
    done.store(true, std::memory_order_relaxed);
    thread.join();
    while (reader.read() > 0) {
    }
    CHECK(dropped_in_part > 0);
    CHECK(!reader.torn && !reader.order_broken);
    CHECK(reader.read_count + reader.lost == pushed);
}

TEST(ring_is_read_whole_by_another_process) {
    constexpr int kRows = 200'000;
    Ring ring(5, 256);
    const int fd = ring.share();
    std::thread thread([&] {
        Producer producer(ring);
        producer.push(kRows);
    });
    CHECK(holds_in_a_child([fd] {
        const RingView view(fd);
        Reader reader(view, 100);
        const std::int64_t end_ns = now_ns() + 60 * kNsPerS;
        while (reader.read_count + reader.lost < kRows && now_ns() < end_ns) reader.read();
        return !reader.torn && !reader.order_broken && reader.read_count >= 256 &&
               reader.read_count + reader.lost == kRows;
    }));
    thread.join();
    ::close(fd);
}

TEST(ring_that_is_shared_cannot_be_changed_by_its_readers) {
    Ring ring(1, 64);
    Producer producer(ring);
    const int fd = ring.share(), again = ring.share();
    CHECK(fd != again);
    const std::string path = "/proc/self/fd/" + std::to_string(fd);
    const int writable = ::open(path.c_str(), O_RDWR | O_CLOEXEC);  // root may, by its mode
    for (const int each : {fd, again, writable}) {
        if (each < 0) continue;
        CHECK(::pwrite(each, "x", 1, 0) < 0);
        CHECK(::ftruncate(each, 0) != 0 && ::ftruncate(each, 1 << 20) != 0);
        ::close(each);
    }
    producer.push(3);  // what was mapped before stays writable
    Reader reader(ring, 64);
    CHECK(reader.read() == 3 && !reader.torn);
}

TEST(ring_finds_the_row_that_an_instant_lies_in) {
    Ring ring(1, 64);
    CHECK(ring.find(5) == 0);  // nothing is there
    const double value = 0;
    for (std::int64_t t_ns = 10; t_ns <= 500; t_ns += 10) ring.push(t_ns, 1, &value);
    CHECK(ring.find(9) == 0);
    CHECK(ring.find(10) == 0);
    CHECK(ring.find(19) == 0);
    CHECK(ring.find(20) == 1);
    CHECK(ring.find(1000) == 49);
    for (std::int64_t t_ns = 510; t_ns <= 2000; t_ns += 10) ring.push(t_ns, 1, &value);
    CHECK(ring.find(2000) == 199);
    CHECK(ring.find(1955) == 194);
    CHECK(ring.find(0) >= 200 - 64 && ring.find(0) <= 200 - 64 + 4);  // the oldest that is safe
}

// A ring whose constructor throws has no mapping. It must not unmap what lies at address 0.
TEST(ring_that_cannot_be_made_unmaps_nothing) {
    CHECK(holds_in_a_child([] {
        void* const low = reinterpret_cast<void*>(0x100000);  // where some programs' code lies
        void* const page = ::mmap(low, 4096, PROT_READ | PROT_WRITE,
                                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
        if (page != low) return true;  // taken, or not allowed: nothing to lose there
        const rlimit none{0, 0};
        std::signal(SIGXFSZ, SIG_IGN);
        if (::setrlimit(RLIMIT_FSIZE, &none) != 0) return false;
        bool refused = false;
        try {
            const Ring ring(100, 1 << 16);
        } catch (const std::system_error&) {
            refused = true;
        }
        unsigned char resident = 0;
        return refused && ::mincore(page, 4096, &resident) == 0;  // ENOMEM: it is unmapped
    }));
}

}  // namespace
