// The core's own tests, without Python: what the sanitizers run (make sanitize).
//
//   core_test [PART OF A NAME]

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "recording/journal.h"
#include "recording/lane_file.h"
#include "sampling/budget.h"
#include "sampling/cadence.h"
#include "sampling/coarse.h"
#include "sampling/readers.h"
#include "sampling/ring.h"
#include "sampling/sampler.h"
#include "sensors/machine_time.h"
#include "sensors/reconciled.h"
#include "sensors/sensor.h"
#include "system/clock.h"
#include "system/notifier.h"

namespace fs = std::filesystem;

thread_local std::uint64_t allocations = 0;

// Not inlined: GCC would take malloc and delete, or new and free, for a pair.
[[gnu::noinline]] void* operator new(std::size_t size) {
    ++allocations;
    if (void* const memory = std::malloc(size > 0 ? size : 1)) return memory;
    throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

using pepr::kNsPerS;
using pepr::now_ns;
using pepr::Ring;
using pepr::RingView;
using pepr::Sampler;

namespace {

constexpr std::int64_t kMs = 1'000'000;

std::atomic<int> failures{0};

void check(bool holds, const char* condition, const char* file, int line) {
    if (holds) return;
    failures.fetch_add(1);
    std::fprintf(stderr, "%s:%d: does not hold: %s\n", file, line, condition);
}

#define CHECK(condition) check((condition), #condition, __FILE__, __LINE__)

// --- the ring ---------------------------------------------------------------------------------

// Every word of row n follows from n alone, so that a row made of two is seen.
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

void ring_keeps_order_in_batches() {
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

void ring_wraps_without_loss_for_a_reader_that_keeps_up() {
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

void ring_counts_laps_exactly_for_each_reader() {
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

void ring_without_channels_still_tells_times() {
    Ring ring(0, 64);
    Producer producer(ring);
    Reader reader(ring, 64);
    producer.push(10);
    CHECK(reader.read() == 10);
    CHECK(!reader.order_broken && !reader.torn);
}

void ring_gives_whole_rows_to_slow_readers_of_a_fast_producer() {
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
void ring_drops_what_is_overwritten_during_a_copy() {
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

// Runs `work` in a forked child; whether it returned true.
bool holds_in_a_child(const std::function<bool()>& work) {
    const pid_t child = ::fork();
    if (child == 0) ::_exit(work() ? 0 : 1);
    int status = -1;
    CHECK(::waitpid(child, &status, 0) == child);
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

void ring_is_read_whole_by_another_process() {
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

void ring_that_is_shared_cannot_be_changed_by_its_readers() {
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

void ring_finds_the_row_that_an_instant_lies_in() {
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

// One that cannot be made has no mapping: nothing is unmapped in its place, at address 0.
void ring_that_cannot_be_made_unmaps_nothing() {
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

void coarse_energy_telescopes_and_comes_seldom() {
    std::vector<pepr::Channel> channels(2);
    channels[0].quantity = "energy";
    channels[0].scale = 1e-6;
    channels[1].quantity = "power";
    pepr::Coarsener coarsener(channels, {10 * kMs, 0.1});
    std::mt19937_64 random(3);
    double energy_uj = 12'345'678'901, first_uj = -1, last_uj = 0, begin_uj = 0;
    std::int64_t last_ns = -1;
    int told = 0;
    for (std::int64_t t_ns = 0; t_ns < 3 * kNsPerS; t_ns += kMs / 2) {
        energy_uj += static_cast<double>(random() % 100'000);
        const double* row = coarsener.take(t_ns, {energy_uj, 7.5});
        if (row == nullptr) continue;
        CHECK(last_ns < 0 || t_ns - last_ns >= 10 * kMs);
        CHECK(std::fmod(row[0], 100'000) == 0 && row[0] <= energy_uj &&
              energy_uj - row[0] < 100'000);
        CHECK(row[1] == 7.5);
        if (first_uj < 0) first_uj = row[0], begin_uj = energy_uj;
        last_ns = t_ns;
        last_uj = row[0];
        CHECK(std::abs((last_uj - first_uj) - (energy_uj - begin_uj)) < 100'000);
        ++told;
    }
    CHECK(told == 300);
    const double* unknown = coarsener.take(4 * kNsPerS, {pepr::kUnknown, 1});
    CHECK(unknown != nullptr && std::isnan(unknown[0]));
}

// --- the cadence ------------------------------------------------------------------------------

// A sensor in virtual time: its refreshes are known, so what a reader missed is too.
struct Refreshes {
    double period_ms, jitter_ms, phase_ms;
    double from_s = 1e9, then_ms = 0;           // the period from then on
    double still_from_s = 1e9, still_to_s = 0;  // refreshes that change nothing
    bool walks = true;                          // jitter adds up
};

struct Followed {
    std::int64_t reads = 0, settled = 0, wasted = 0;  // wasted of the settled
    std::int64_t seen = 0, missed = 0;                // of all devices, after learn_s
    std::int64_t longest_ns = 0, late_ns = 0;         // the mean lag behind a refresh
    std::int64_t refresh_ns = 0;
    double wasted_share() const {
        return settled > 0 ? static_cast<double>(wasted) / static_cast<double>(settled) : 0.0;
    }
};

Followed follow(const std::vector<Refreshes>& devices, std::int64_t base_ns, double duration_s,
                double learn_s, double modulus_j = 0) {
    std::mt19937 random(7);
    std::vector<pepr::Channel> channels;
    std::vector<std::vector<std::int64_t>> edges;
    for (const Refreshes& device : devices) {
        pepr::Channel channel;
        channel.name = "device" + std::to_string(channels.size()) + "/energy";
        channel.quantity = "energy";
        channel.counter = true;
        channel.modulus = modulus_j;
        channels.push_back(channel);
        std::vector<std::int64_t>& at_ns = edges.emplace_back();
        std::uniform_real_distribution<double> jitter(-device.jitter_ms, device.jitter_ms);
        for (double t_ms = device.phase_ms, grid_ms = t_ms; t_ms < 1e3 * duration_s;) {
            if (t_ms < 1e3 * device.still_from_s || t_ms >= 1e3 * device.still_to_s)
                at_ns.push_back(static_cast<std::int64_t>(1e6 * t_ms));
            grid_ms += t_ms > 1e3 * device.from_s ? device.then_ms : device.period_ms;
            const double next_ms = grid_ms + jitter(random);
            if (device.walks) grid_ms = next_ms;
            t_ms = next_ms;
        }
    }
    pepr::Cadence cadence(channels, base_ns);
    std::exponential_distribution<double> lateness_ms(1 / 0.06);
    std::vector<double> row(devices.size());
    std::vector<std::size_t> counts(devices.size(), 0);
    Followed result;
    double lag_ns = 0;
    const auto end_ns = static_cast<std::int64_t>(1e9 * duration_s);
    for (std::int64_t t_ns = 0; t_ns < end_ns;) {
        for (std::size_t i = 0; i < devices.size(); ++i) {
            const std::size_t before = counts[i];
            while (counts[i] < edges[i].size() && edges[i][counts[i]] <= t_ns) ++counts[i];
            row[i] = 1000.0 + static_cast<double>(counts[i]);
            if (counts[i] == before || static_cast<double>(t_ns) < 1e9 * learn_s) continue;
            ++result.seen;
            result.missed += static_cast<std::int64_t>(counts[i] - before) - 1;
            lag_ns += static_cast<double>(t_ns - edges[i][counts[i] - 1]);
        }
        const bool settled = cadence.settled() && static_cast<double>(t_ns) >= 1e9 * learn_s;
        const bool changed = cadence.saw(t_ns, row.data());
        ++result.reads;
        if (settled) {
            ++result.settled;
            if (!changed) ++result.wasted;
        }
        const std::int64_t next_ns =
            cadence.next_ns() + static_cast<std::int64_t>(1e6 * lateness_ms(random));
        result.longest_ns = std::max(result.longest_ns, next_ns - t_ns);
        t_ns = next_ns;
    }
    result.refresh_ns = cadence.refresh_ns();
    if (result.seen > 0)
        result.late_ns = static_cast<std::int64_t>(lag_ns / static_cast<double>(result.seen));
    return result;
}

bool near(std::int64_t value, std::int64_t expected, double by) {
    return std::abs(static_cast<double>(value - expected)) <= by * static_cast<double>(expected);
}

void cadence_reads_just_after_each_refresh() {
    const Refreshes kSensors[] = {
        {100, 0, 37}, {101.5, 2.5, 37}, {20, 0.2, 3}, {33, 0.3, 3}, {500, 5, 3}};
    for (const Refreshes& sensor : kSensors) {
        const Followed found = follow({sensor}, 10 * kMs, 120, 5);
        const auto period_ns = static_cast<std::int64_t>(1e6 * sensor.period_ms);
        CHECK(found.missed == 0);
        CHECK(found.wasted_share() <= 0.30);
        CHECK(near(found.refresh_ns, period_ns, 0.01));
        CHECK(found.late_ns < period_ns / 12);
    }
}

void cadence_holds_against_jitter_about_a_clock() {
    Refreshes sensor{100, 5, 37};
    sensor.walks = false;
    const Followed found = follow({sensor}, 10 * kMs, 120, 5);
    CHECK(found.missed == 0 && found.wasted_share() <= 0.30);
}

void cadence_learns_anew_when_a_sensor_changes_its_pace() {
    const struct {
        double from_ms, to_ms;
    } kChanges[] = {{100, 20}, {20, 100}, {100, 60}, {60, 100}, {100, 95}};
    for (const auto& change : kChanges) {
        Refreshes sensor{change.from_ms, change.from_ms / 100, 37};
        sensor.from_s = 30;
        sensor.then_ms = change.to_ms;
        // a minute to notice, the next one judged
        const Followed found = follow({sensor}, 10 * kMs, 150, 90);
        CHECK(near(found.refresh_ns, static_cast<std::int64_t>(1e6 * change.to_ms), 0.02));
        CHECK(found.missed == 0 && found.wasted_share() <= 0.30);
    }
}

void cadence_reads_several_devices_once_a_refresh() {
    std::vector<Refreshes> devices;
    for (int i = 0; i < 8; ++i) devices.push_back({100 + 0.05 * i, 0.5, 12.3 * i + 3});
    const Followed found = follow(devices, 10 * kMs, 120, 5);
    CHECK(found.wasted_share() <= 0.30);
    CHECK(found.missed * 1000 <= found.seen);
    CHECK(found.reads < 120 * 15);  // 10 refreshes a second; each its own would be 80
}

void cadence_follows_the_fastest_of_unlike_devices() {
    const Followed found = follow({{20, 0.1, 3}, {100, 1, 50}}, 10 * kMs, 120, 5);
    CHECK(found.missed == 0 && found.wasted_share() <= 0.30);
}

// A RAPL counter in uJ, refreshed each ms or so, read as a cadence of 20 ms wants it: how often
// from from_s to to_s, and how far apart at most.
struct Counted {
    std::int64_t reads = 0, widest_ns = 0;
};

template <typename Power>
Counted count_reads(const Power& power_w, double from_s, double to_s, double range_uj = 0) {
    pepr::Channel channel;
    channel.name = "package/energy";
    channel.quantity = "energy";
    channel.counter = true;
    pepr::Cadence cadence({channel}, 20 * kMs);
    std::mt19937 random(5);
    std::uniform_real_distribution<double> jitter_ms(0.9, 1.1);
    double energy_uj = 1e6, refresh_ms = 0;
    Counted found;
    for (std::int64_t t_ns = kMs, last_ns = 0; static_cast<double>(t_ns) < 1e9 * to_s;) {
        for (; 1e6 * refresh_ms <= static_cast<double>(t_ns); refresh_ms += jitter_ms(random))
            energy_uj += 1e3 * power_w(1e-3 * refresh_ms);
        if (range_uj > 0) energy_uj = std::fmod(energy_uj, range_uj);
        const double value = std::floor(energy_uj);
        cadence.saw(t_ns, &value);
        if (static_cast<double>(t_ns) >= 1e9 * from_s) {
            ++found.reads;
            found.widest_ns = std::max(found.widest_ns, t_ns - last_ns);
        }
        last_ns = t_ns;
        t_ns = cadence.next_ns();
    }
    return found;
}

void cadence_keeps_to_its_base_where_each_read_brings_news() {
    // given power that alternates every 0.3 s
    const auto restless = [](double t_s) { return std::fmod(t_s, 0.6) < 0.3 ? 60.0 : 140.0; };
    const Counted found = count_reads(restless, 5, 65);
    CHECK(near(found.reads, 60 * 50, 0.01) && found.widest_ns < 21 * kMs);
    // and a domain that never counts does not matter
    Refreshes off{100, 0, 0.3};
    off.still_from_s = 0;
    off.still_to_s = 1e9;
    const Followed alone = follow({{1, 0, 0.3}}, 20 * kMs, 60, 5);
    const Followed beside = follow({{1, 0, 0.3}, off}, 20 * kMs, 60, 5);
    CHECK(alone.wasted == 0 && alone.refresh_ns == 0);
    CHECK(beside.wasted == 0 && near(beside.reads, alone.reads, 0.01));
}

void cadence_reads_steady_power_more_seldom_until_it_changes() {
    // given noise of 3 %, and a step after a minute, of which nothing is known before
    std::mt19937 random(11);
    std::normal_distribution<double> noise(1, 0.03);
    const auto power_w = [&](double t_s) { return (t_s < 60 ? 100 : 160) * noise(random); };
    const Counted steady = count_reads(power_w, 10, 60);
    CHECK(near(steady.reads, 50 * 25 / 2, 0.05) && steady.widest_ns <= 80 * kMs);
    // when it has stepped, then at the base for 0.3 s, and back in 1 s
    CHECK(near(count_reads(power_w, 60.1, 60.4).reads, 15, 0.14));
    CHECK(near(count_reads(power_w, 62, 72).reads, 125, 0.05));
    // and a wrap, here every 4 s, is taken for a step, no more
    CHECK(count_reads(power_w, 10, 50, 4e8).reads <= 40 * 30);
}

void cadence_does_not_take_rest_for_a_slow_sensor() {
    Refreshes sensor{100, 1, 37};
    sensor.still_from_s = 20;
    sensor.still_to_s = 3600;
    const Followed found = follow({sensor}, 10 * kMs, 3660, 3600);
    // the period is known when it moves again, from the first second on
    CHECK(near(found.refresh_ns, 100 * kMs, 0.02));
    CHECK(found.missed <= 1 && found.seen >= 590);
    CHECK(found.reads < 3660 * 13);
}

void cadence_searches_a_dead_counter_for_a_while_only() {
    Refreshes off{100, 0, 0.3};
    off.still_from_s = 0;
    off.still_to_s = 1e9;
    const Followed found = follow({off}, 10 * kMs, 3600, 5);
    CHECK(found.reads < 3600 * 2);
    CHECK(found.longest_ns < kNsPerS);
}

void cadence_never_sleeps_through_half_a_range() {
    Refreshes slow{5000, 0, 3};
    CHECK(follow({slow}, 10 * kMs, 60, 5).longest_ns < kNsPerS);
    // 8 kJ pass in 0.4 s at 20 kW
    CHECK(follow({slow}, 10 * kMs, 60, 5, 8000).longest_ns < 205 * kMs);
}

void cadence_is_not_misled_by_unknown_values() {
    pepr::Channel channel;
    channel.name = "x/energy";
    channel.quantity = "energy";
    pepr::Cadence cadence({channel}, 10 * kMs);
    std::int64_t t_ns = 0, unknown_reads = 0;
    for (int i = 0; t_ns < 60 * kNsPerS; ++i) {
        const bool unknown = t_ns > 20 * kNsPerS && t_ns < 40 * kNsPerS;
        const double value = unknown ? pepr::kUnknown : static_cast<double>(t_ns / (100 * kMs));
        if (unknown) ++unknown_reads;
        cadence.saw(t_ns, &value);
        CHECK(cadence.next_ns() > t_ns && cadence.next_ns() <= t_ns + kNsPerS);
        t_ns = cadence.next_ns();
    }
    CHECK(near(cadence.refresh_ns(), 100 * kMs, 0.02));
    CHECK(unknown_reads < 20 * 100);
}

// Lanes in virtual time, each read costing its CPU time: what they use together, from 10 s on.
struct VirtualLane {
    double period_ms, cost_us;
    bool gives_way = false;
};

double used_share(double limit, const std::vector<VirtualLane>& lanes,
                  std::vector<double>* rates = nullptr) {
    const auto budget = std::make_shared<pepr::CpuBudget>(limit);
    struct Lane {
        std::unique_ptr<pepr::Throttle> throttle;
        std::int64_t period_ns, cost_ns;
        bool gives_way;
        std::int64_t next_ns = 0, cpu_ns = 0, counted_ns = 0, reads = 0;
    };
    std::vector<Lane> all;
    for (const auto& [period_ms, cost_us, gives_way] : lanes)
        all.push_back({std::make_unique<pepr::Throttle>(budget),
                       static_cast<std::int64_t>(1e6 * period_ms),
                       static_cast<std::int64_t>(1e3 * cost_us), gives_way});
    constexpr std::int64_t kEndNs = 60 * kNsPerS, kFromNs = 10 * kNsPerS;
    for (;;) {
        Lane& lane = *std::min_element(all.begin(), all.end(), [](const Lane& a, const Lane& b) {
            return a.next_ns < b.next_ns;
        });
        if (lane.next_ns >= kEndNs) break;
        const std::int64_t t_ns = lane.next_ns;
        lane.cpu_ns += lane.cost_ns;
        if (t_ns >= kFromNs) {
            lane.counted_ns += lane.cost_ns;
            ++lane.reads;
        }
        const bool held = lane.throttle->min_spacing_ns() > lane.period_ns;
        if (lane.throttle->read(t_ns, held))
            lane.throttle->account(t_ns, lane.cpu_ns, lane.gives_way);
        lane.next_ns = t_ns + std::max(lane.period_ns, lane.throttle->min_spacing_ns());
    }
    double sum_ns = 0;
    for (const Lane& lane : all) {
        sum_ns += static_cast<double>(lane.counted_ns);
        if (rates != nullptr) rates->push_back(static_cast<double>(lane.reads) / 50.0);
    }
    return sum_ns / static_cast<double>(kEndNs - kFromNs);
}

void budget_is_kept_by_stretching_all_lanes_alike() {
    // given lanes that would take 2 %, 1 % and 0.1 % of a core, of whatever kind
    for (const bool gives_way : {false, true}) {
        std::vector<double> rates;
        const double used =
            used_share(0.005, {{20, 400, gives_way}, {10, 100}, {100, 100}}, &rates);
        CHECK(used <= 0.0051 && used > 0.004);
        CHECK(std::abs(rates[1] / rates[0] - 2) < 0.3 && std::abs(rates[1] / rates[2] - 10) < 1.5);
    }
}

void budget_is_kept_by_those_that_wait_for_no_refresh_first() {
    // given 0.3 % for a lane that follows refreshes, 0.3 % for two that do not
    std::vector<double> rates;
    double used = used_share(0.005, {{100, 300}, {20, 50, true}, {100, 50, true}}, &rates);
    CHECK(used <= 0.0051 && used > 0.0045);
    CHECK(std::abs(rates[0] - 10) < 0.1);
    CHECK(std::abs(rates[1] - 50 / 1.5) < 1 && std::abs(rates[2] - 10 / 1.5) < 0.5);

    // given 0.8 % and 0.4 %: a fourth of that is what these come down to
    rates.clear();
    used = used_share(0.005, {{100, 800}, {20, 80, true}}, &rates);
    CHECK(used <= 0.0051 && used > 0.0045);
    CHECK(std::abs(rates[0] - 5) < 0.3 && std::abs(rates[1] - 12.5) < 0.5);
}

void budget_gives_half_to_those_that_wait_for_no_refresh() {
    // given 0.1 % for a lane that follows refreshes, 0.4 % for one that does not
    std::vector<double> rates;
    double used = used_share(0.005, {{100, 100}, {20, 80, true}}, &rates);
    CHECK(std::abs(used - 0.0035) < 1e-4);
    CHECK(std::abs(rates[0] - 10) < 0.1 && std::abs(rates[1] - 50 / 1.6) < 1);

    // given 1.6 %, of which a fourth is more than that half
    rates.clear();
    used = used_share(0.005, {{100, 50}, {20, 320, true}}, &rates);
    CHECK(std::abs(used - 0.0045) < 1e-4);
    CHECK(std::abs(rates[0] - 10) < 0.1 && std::abs(rates[1] - 12.5) < 0.3);
}

void budget_follows_what_a_lane_would_like() {
    // given a lane that is held back, and then wants less than it may
    const auto budget = std::make_shared<pepr::CpuBudget>(0.005);
    pepr::Throttle throttle(budget);
    std::int64_t t_ns = 0, cpu_ns = 0;
    const auto live = [&](std::int64_t wanted_ns, std::int64_t until_ns) {
        for (; t_ns < until_ns; t_ns += std::max(wanted_ns, throttle.min_spacing_ns())) {
            cpu_ns += 200'000;
            if (throttle.read(t_ns, throttle.min_spacing_ns() > wanted_ns))
                throttle.account(t_ns, cpu_ns, false);
        }
    };
    live(10 * kMs, 10 * kNsPerS);
    CHECK(near(throttle.min_spacing_ns(), 40 * kMs, 0.05));
    live(50 * kMs, 20 * kNsPerS);
    CHECK(throttle.min_spacing_ns() == 0);
    live(10 * kMs, 30 * kNsPerS);
    CHECK(near(throttle.min_spacing_ns(), 40 * kMs, 0.05));
}

void budget_that_suffices_stretches_nothing() {
    std::vector<double> rates;
    const double used = used_share(0.005, {{20, 20}, {100, 100}}, &rates);
    CHECK(std::abs(used - 0.002) < 1e-4);
    CHECK(std::abs(rates[0] - 50) < 0.1 && std::abs(rates[1] - 10) < 0.1);
}

void budget_too_small_still_reads_before_a_gap() {
    std::vector<double> rates;
    used_share(0.0001, {{20, 5000}}, &rates);
    CHECK(rates[0] > 1.0);
}

void budget_does_not_count_the_start() {
    const auto budget = std::make_shared<pepr::CpuBudget>(0.005);
    pepr::Throttle throttle(budget);
    // 50 % of a core in the first second, next to nothing afterwards
    for (std::int64_t t_ns = 0; t_ns <= 5 * kNsPerS; t_ns += 10 * kMs) {
        const std::int64_t cpu_ns =
            std::min(t_ns, kNsPerS) / 2 + std::max<std::int64_t>(0, t_ns - kNsPerS) / 1000;
        if (throttle.read(t_ns, false)) throttle.account(t_ns, cpu_ns, false);
        CHECK(throttle.min_spacing_ns() == 0);
    }
}

// --- the sampler ------------------------------------------------------------------------------

class Folder {
public:
    Folder() {
        std::string name = (fs::temp_directory_path() / "pepr-core-XXXXXX").string();
        if (::mkdtemp(name.data()) == nullptr)
            throw std::system_error(errno, std::generic_category(), name);
        path_ = name;
    }
    ~Folder() { fs::remove_all(path_); }
    std::string write(const char* name, const std::string& text) const {
        std::ofstream(path_ / name) << text;
        return (path_ / name).string();
    }
    std::string fifo(const char* name) const {
        const std::string path = (path_ / name).string();
        if (::mkfifo(path.c_str(), 0600) != 0)
            throw std::system_error(errno, std::generic_category(), path);
        return path;
    }

private:
    fs::path path_;
};

constexpr const char* kChannels =
    "channel\ta\tenergy\tJ\t1\t0\tcounter\treplay\tzone=x\n"
    "channel\tb\tpower\tW\t0.001\t0\tgauge\treplay\n";

std::string two_channels(const Folder& folder) {
    return "replay:" + folder.write("two", std::string(kChannels) + "0\t1\t2\n");
}

// Replay opens its file as any program would: a FIFO without a writer is a driver that hangs.
class HangingDriver {
public:
    HangingDriver() : path_(folder_.fifo("driver")) {}
    std::string spec() const { return "replay:" + path_; }
    void answer(const std::string& text) {
        const int fd = ::open(path_.c_str(), O_WRONLY | O_CLOEXEC);  // waits for the reader's open
        CHECK(::write(fd, text.data(), text.size()) == static_cast<ssize_t>(text.size()));
        ::close(fd);
    }

private:
    Folder folder_;
    std::string path_;
};

struct Recorded {
    std::vector<std::int64_t> t_ns, read_ns;
    std::vector<std::vector<double>> columns;
};

Recorded read_all(Sampler& sampler) {
    constexpr std::size_t kBatch = 100;
    const std::size_t width = sampler.width();
    std::vector<std::int64_t> t_ns(kBatch), read_ns(kBatch);
    std::vector<double> values(kBatch * width);
    Recorded all{{}, {}, std::vector<std::vector<double>>(width)};
    while (const std::size_t n =
               sampler.read({t_ns.data(), read_ns.data(), values.data(), kBatch})) {
        const auto rows = static_cast<std::ptrdiff_t>(n);
        all.t_ns.insert(all.t_ns.end(), t_ns.begin(), t_ns.begin() + rows);
        all.read_ns.insert(all.read_ns.end(), read_ns.begin(), read_ns.begin() + rows);
        for (std::size_t c = 0; c < width; ++c) {
            const auto first = values.begin() + static_cast<std::ptrdiff_t>(c * kBatch);
            all.columns[c].insert(all.columns[c].end(), first, first + rows);
        }
    }
    return all;
}

std::size_t entries_of(const char* folder) {
    return static_cast<std::size_t>(
        std::distance(fs::directory_iterator(folder), fs::directory_iterator()));
}

template <typename F>
bool explains_itself(F&& call) {
    try {
        call();
    } catch (const pepr::SensorError& error) {
        return std::strlen(error.what()) > 0 && !error.note.why.empty() && !error.note.fix.empty();
    }
    return false;
}

template <typename F>
bool comes_true(F&& condition, std::int64_t timeout_ns = 20 * kNsPerS) {
    for (const std::int64_t end_ns = now_ns() + timeout_ns; now_ns() < end_ns;) {
        if (condition()) return true;
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return false;
}

void sampler_takes_its_last_sample_at_once() {
    const Folder folder;
    Sampler sampler({two_channels(folder), 3600 * kNsPerS});
    CHECK(sampler.wait_ready(10 * kNsPerS));
    const std::int64_t begin_ns = now_ns();
    CHECK(sampler.stop(10 * kNsPerS));
    const std::int64_t end_ns = now_ns();
    CHECK(end_ns - begin_ns < kNsPerS);
    const Recorded rows = read_all(sampler);
    CHECK(rows.t_ns.size() == 2);
    CHECK(rows.t_ns.back() >= begin_ns && rows.t_ns.back() <= end_ns);
    CHECK(rows.columns[0] == std::vector<double>({1, 1}));
    CHECK(rows.columns[1] == std::vector<double>({2, 2}));
    CHECK(sampler.state() == Sampler::State::kStopped);
    CHECK(sampler.stop(0));  // again: nothing to do
}

void sampler_follows_what_it_reads() {
    // given a counter that is refreshed every 50 ms, for 5 s
    const Folder folder;
    std::string text = "channel\ta/energy\tenergy\tJ\t1\t0\tcounter\treplay\n";
    for (int i = 0; i < 100; ++i)
        text += std::to_string(0.05 * i) + "\t" + std::to_string(i) + "\n";
    Sampler sampler({"replay:" + folder.write("steps", text), 5 * kMs, true,
                     std::make_shared<pepr::CpuBudget>(0.5)});
    CHECK(sampler.wait_ready(10 * kNsPerS));
    Recorded rows;
    while (sampler.stats().settled < 30 && sampler.stats().samples < 900) std::this_thread::yield();
    CHECK(sampler.stop(10 * kNsPerS));
    const Sampler::Stats stats = sampler.stats();
    CHECK(near(stats.refresh_ns, 50 * kMs, 0.1));
    CHECK(stats.settled >= 30 && stats.wasted * 2 < stats.settled);
}

// However small the budget: beyond half its range, what a counter wrapped by is anybody's guess.
void sampler_that_is_held_back_still_sees_every_wrap() {
    // given a counter of 4 kJ, which 20 kW fill in 200 ms, refreshed every 10 ms
    const Folder folder;
    std::string text = "channel\ta/energy\tenergy\tJ\t1\t4000\tcounter\treplay\n";
    for (int i = 0; i < 3000; ++i)
        text += std::to_string(0.01 * i) + "\t" + std::to_string(i) + "\n";
    Sampler sampler({"replay:" + folder.write("steps", text), kMs, true,
                     std::make_shared<pepr::CpuBudget>(1e-6)});
    CHECK(sampler.wait_ready(10 * kNsPerS));
    // when the budget would have it read less often than that
    CHECK(comes_true([&] { return sampler.stats().min_spacing_ns > 500 * kMs; }));
    const std::int64_t from_ns = now_ns();
    std::this_thread::sleep_for(std::chrono::milliseconds(1500));
    CHECK(sampler.stop(10 * kNsPerS));
    // then it is read every 100 ms: held back, but no more
    const Recorded rows = read_all(sampler);
    const auto reads = std::count_if(rows.t_ns.begin(), rows.t_ns.end(),
                                     [from_ns](std::int64_t t_ns) { return t_ns > from_ns; });
    CHECK(reads >= 8 && reads <= 30);
}

void sampler_stopped_before_it_is_open_still_samples_once() {
    const Folder folder;
    Sampler sampler({two_channels(folder), 3600 * kNsPerS});
    CHECK(sampler.stop(10 * kNsPerS));
    CHECK(read_all(sampler).t_ns.size() >= 1);
}

void sampler_forgets_no_deadline() {
    const Folder folder;
    constexpr std::int64_t kPeriodNs = kMs;
    Sampler sampler({two_channels(folder), kPeriodNs});
    CHECK(sampler.wait_ready(10 * kNsPerS));
    while (sampler.stats().samples < 250) std::this_thread::yield();
    CHECK(sampler.stop(10 * kNsPerS));
    const Recorded rows = read_all(sampler);
    const Sampler::Stats stats = sampler.stats();
    CHECK(rows.t_ns.size() == stats.samples);
    CHECK(stats.lost == 0);
    // First sample, one a deadline, last sample: late, skipped or in time, each deadline counts
    // once.
    const std::int64_t passed = (rows.t_ns.back() - rows.t_ns.front()) / kPeriodNs;
    const auto accounted = static_cast<std::int64_t>(stats.samples - 2 + stats.skipped);
    CHECK(std::abs(accounted - passed) <= 1);
    for (std::size_t i = 1; i < rows.t_ns.size(); ++i) CHECK(rows.t_ns[i] > rows.t_ns[i - 1]);
    for (const std::int64_t read_ns : rows.read_ns) CHECK(read_ns >= 0 && read_ns < kNsPerS);
    CHECK(stats.cpu_ns > 0 && stats.cpu_ns < rows.t_ns.back() - rows.t_ns.front());
}

void sampler_tells_others_coarsely_and_from_the_same_reads() {
    const Folder folder;
    std::string text = "channel\ta/energy\tenergy\tJ\t0.001\t0\tcounter\treplay\n";
    for (int i = 0; i < 5000; ++i)
        text += std::to_string(0.001 * i) + "\t" + std::to_string(37 * i) + "\n";
    const std::string spec = "replay:" + folder.write("ramp", text);
    Sampler sampler({spec, kMs, false, nullptr, pepr::Coarse{10 * kMs, 0.5}});
    CHECK(sampler.wait_ready(10 * kNsPerS));
    while (sampler.stats().samples < 300) std::this_thread::yield();
    CHECK(sampler.stop(10 * kNsPerS));
    std::vector<std::int64_t> t_ns[2], read_ns(4096);
    std::vector<double> values[2];
    for (const int coarse : {0, 1}) {
        const int fd = sampler.share(coarse == 1);
        const RingView view(fd);
        ::close(fd);
        t_ns[coarse].resize(4096);
        values[coarse].resize(4096);
        std::uint64_t cursor = 0, lost = 0;
        const std::size_t rows = view.read(
            cursor, {t_ns[coarse].data(), read_ns.data(), values[coarse].data(), 4096}, lost);
        CHECK(lost == 0 && rows > 0);
        t_ns[coarse].resize(rows);
    }
    CHECK(t_ns[0].size() == sampler.stats().samples && t_ns[1].size() <= t_ns[0].size() / 2);
    std::size_t fine = 0;
    for (std::size_t i = 0; i < t_ns[1].size(); ++i) {
        CHECK(i == 0 || t_ns[1][i] - t_ns[1][i - 1] >= 10 * kMs);
        while (fine < t_ns[0].size() && t_ns[0][fine] < t_ns[1][i]) ++fine;
        CHECK(fine < t_ns[0].size() && t_ns[0][fine] == t_ns[1][i]);
        CHECK(values[1][i] == std::floor(values[0][fine] / 500) * 500);
    }
    // a lane without a coarse ring has none to give: never the fine one instead
    Sampler open({spec, kMs});
    CHECK(open.wait_ready(10 * kNsPerS));
    bool refused = false;
    try {
        open.share(true);
    } catch (const std::logic_error&) {
        refused = true;
    }
    CHECK(refused);
}

void sampler_counts_what_is_unknown() {
    const Folder folder;
    const std::string path =
        folder.write("nan", std::string(kChannels) + "0\t1\tnan\n0.1\tnan\tnan\n0.3\t3\t4\n");
    Sampler sampler({"replay:" + path, 2 * kMs});
    CHECK(sampler.wait_ready(10 * kNsPerS));
    std::uint64_t unknown = 0;
    for (bool stopped = false, done = false; !done;) {
        done = stopped;
        const Recorded rows = read_all(sampler);
        for (const auto& column : rows.columns)
            for (const double value : column) unknown += std::isnan(value) ? 1 : 0;
        if (!stopped && !rows.t_ns.empty() && rows.columns[1].back() == 4)
            stopped = sampler.stop(10 * kNsPerS);
        std::this_thread::yield();
    }
    CHECK(unknown > 0);
    CHECK(sampler.stats().failed_reads == unknown);
}

void sampler_that_never_opens_is_given_up_in_time() {
    HangingDriver driver;
    Sampler sampler({driver.spec(), kMs});
    CHECK(!sampler.wait_ready(20 * kMs));
    CHECK(sampler.state() == Sampler::State::kOpening);
    CHECK(explains_itself([&] { sampler.channels(); }));
    CHECK(explains_itself([&] { sampler.width(); }));
    const std::int64_t begin_ns = now_ns();
    CHECK(!sampler.stop(100 * kMs));
    const std::int64_t waited_ns = now_ns() - begin_ns;
    CHECK(waited_ns >= 100 * kMs && waited_ns < 2 * kNsPerS);
    CHECK(sampler.stop(0));  // it was left behind: nothing more to wait for
    driver.answer("");       // lets the thread go, after all
}

void sampler_left_behind_outlives_its_owner() {
    HangingDriver driver;
    const std::size_t threads_before = entries_of("/proc/self/task");
    {
        const Sampler sampler({driver.spec(), kMs});
        const std::int64_t begin_ns = now_ns();
        while (entries_of("/proc/self/task") == threads_before && now_ns() < begin_ns + kNsPerS) {
        }
    }  // destroyed without stop: waits a second, then leaves the thread alone
    driver.answer(std::string(kChannels) +
                  "0\t1\t2\n");  // it wakes up to memory that must be there
    for (const std::int64_t end_ns = now_ns() + 10 * kNsPerS; now_ns() < end_ns;)
        if (entries_of("/proc/self/task") <= threads_before) break;
    CHECK(entries_of("/proc/self/task") <= threads_before);
}

void sampler_rethrows_why_it_failed() {
    for (const char* spec : {"replay:/nowhere/at/all", "powercap:/nowhere", "nvml:/nowhere.so",
                             "magic", "processes:", "processes:parents", "processes:pids=",
                             "processes:pids=0", "processes:pids=1;2", "processes:pids=12345678"}) {
        Sampler sampler({spec, kMs});
        CHECK(explains_itself([&] { sampler.wait_ready(10 * kNsPerS); }));
        CHECK(sampler.state() == Sampler::State::kFailed);
        CHECK(explains_itself([&] { sampler.channels(); }));
        CHECK(explains_itself([&] { sampler.notes(); }));
        CHECK(sampler.stop(10 * kNsPerS));
    }
}

void sampler_cycles_leave_nothing_behind() {
    const Folder folder;
    const std::string spec = two_channels(folder);
    const std::size_t files = entries_of("/proc/self/fd"), threads = entries_of("/proc/self/task");
    for (int cycle = 0; cycle < 150; ++cycle) {
        Sampler sampler({spec, kMs});
        if (cycle % 3 == 0) CHECK(sampler.wait_ready(10 * kNsPerS));
        if (cycle % 2 == 0) CHECK(sampler.stop(10 * kNsPerS));
    }
    CHECK(entries_of("/proc/self/fd") == files);
    CHECK(entries_of("/proc/self/task") == threads);
}

void sampler_lets_a_forked_child_go() {
    const Folder folder;
    auto sampler = std::make_unique<Sampler>(pepr::Lane::How{two_channels(folder), kMs});
    CHECK(sampler->wait_ready(10 * kNsPerS));
    for (int round = 0; round < 20; ++round) {
        const pid_t child = ::fork();
        if (child == 0) {
            ::alarm(10);  // a child that hangs dies of it
            const bool left_alone = !sampler->stop(10 * kNsPerS);
            sampler.reset();
            ::_exit(left_alone ? 0 : 1);
        }
        int status = -1;
        CHECK(::waitpid(child, &status, 0) == child);
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    }
    const std::uint64_t samples = sampler->stats().samples;
    CHECK(sampler->stop(10 * kNsPerS));
    CHECK(sampler->stats().samples > samples);  // the parent's lane ran on
}

// --- the readers: lanes that share their wake-ups
// -------------------------------------------------

// A driver that hangs, or takes its time, when told; it notes who reads it.
class Moody final : public pepr::Sensor {
public:
    static constexpr int kMoods = 4;
    struct Mood {
        std::atomic<std::int64_t> takes_ns{0};
        std::atomic<bool> hangs{false};
        std::atomic<std::thread::id> reader{};
        std::atomic<std::uint64_t> reads{0}, allocations{0};
    };
    static Mood moods[kMoods];

    static std::unique_ptr<pepr::Sensor> open(const std::string& spec) {
        return std::make_unique<Moody>(moods[std::stoi(spec)]);
    }
    static pepr::Lane::How how(int which, std::int64_t period_ns) {
        Mood& mood = moods[which];
        mood.takes_ns = 0;
        mood.hangs = false;
        mood.reads = mood.allocations = 0;
        pepr::Lane::How how{std::to_string(which), period_ns};
        how.open = open;
        return how;
    }

    explicit Moody(Mood& mood) : mood_(mood) {
        channels_.push_back({"a/energy", "energy", "J", 1.0, 0.0, true, "test", {}});
    }
    void poll(double* out) noexcept override {
        mood_.reader = std::this_thread::get_id();
        mood_.allocations = allocations;
        const std::int64_t begin_ns = now_ns();
        while (mood_.hangs) std::this_thread::sleep_for(std::chrono::milliseconds(1));
        while (now_ns() - begin_ns < mood_.takes_ns) {
        }
        *out = static_cast<double>(++mood_.reads);
    }

private:
    Mood& mood_;
};

Moody::Mood Moody::moods[Moody::kMoods];

bool is_one_reader(int a, int b) {
    return Moody::moods[a].reader.load() == Moody::moods[b].reader.load();
}

// How often the sampling threads of this process went to sleep.
std::uint64_t sleeps_of_samplers() {
    std::uint64_t sum = 0;
    for (const auto& task : fs::directory_iterator("/proc/self/task")) {
        std::string line, name;
        std::getline(std::ifstream(task.path() / "comm"), name);
        std::ifstream status(task.path() / "status");
        const std::string label = "voluntary_ctxt_switches:";
        while (name == "pepr-sampler" && std::getline(status, line))
            if (line.rfind(label, 0) == 0) sum += std::stoull(line.substr(label.size()));
    }
    return sum;
}

std::int64_t longest_gap_ns(const Recorded& rows) {
    std::int64_t longest_ns = 0;
    for (std::size_t i = 1; i < rows.t_ns.size(); ++i)
        longest_ns = std::max(longest_ns, rows.t_ns[i] - rows.t_ns[i - 1]);
    return longest_ns;
}

void readers_read_quick_lanes_by_one_thread_and_slow_ones_by_another() {
    const auto readers = std::make_shared<pepr::Readers>();
    Sampler quick(Moody::how(0, 4 * kMs), readers);
    CHECK(quick.wait_ready(10 * kNsPerS));
    std::this_thread::sleep_for(std::chrono::microseconds(1500));  // begun apart, they meet
    Sampler other(Moody::how(1, 4 * kMs), readers);
    CHECK(other.wait_ready(10 * kNsPerS));
    CHECK(comes_true([] { return is_one_reader(0, 1); }));
    // due together, they are read in one wake-up: the threads sleep once for two reads
    CHECK(comes_true([] {
        const std::uint64_t slept = sleeps_of_samplers(), read = Moody::moods[0].reads;
        std::this_thread::sleep_for(std::chrono::milliseconds(200));
        const std::uint64_t reads = Moody::moods[0].reads - read;
        return is_one_reader(0, 1) && reads > 30 &&
               2 * (sleeps_of_samplers() - slept) < 3 * reads;  // apart they would sleep for each
    }));
    Moody::moods[1].takes_ns = 8 * kMs;
    CHECK(comes_true([] { return !is_one_reader(0, 1); }));
    const std::uint64_t before = Moody::moods[1].reads;
    CHECK(comes_true([&] { return Moody::moods[1].reads > before + 30; }));
    CHECK(!is_one_reader(0, 1));
    Moody::moods[1].takes_ns = 0;
    CHECK(comes_true([] { return is_one_reader(0, 1); }));
    CHECK(quick.stop(10 * kNsPerS) && other.stop(10 * kNsPerS));
    for (Sampler* sampler : {&quick, &other}) {
        const Recorded rows = read_all(*sampler);
        const std::uint64_t lost =
            sampler->stats().lost;  // where all this took 1,024 reads or more
        CHECK(rows.t_ns.size() + lost == sampler->stats().samples);
        for (std::size_t i = 0; i < rows.columns[0].size(); ++i)  // none twice, none left out
            CHECK(rows.columns[0][i] == static_cast<double>(lost + i + 1));
        CHECK(sampler->stats().cpu_ns > 0);
    }
}

void readers_go_on_when_a_driver_keeps_its_leader() {
    const std::size_t threads_before = entries_of("/proc/self/task");
    {
        const auto readers = std::make_shared<pepr::Readers>();
        Sampler hung(Moody::how(0, 2 * kMs), readers), other(Moody::how(1, 2 * kMs), readers);
        Sampler third(Moody::how(2, 5 * kMs), readers);
        for (int round = 0; round < 3; ++round) {
            // given all in one hand, which is kept
            CHECK(comes_true([] { return is_one_reader(0, 1) && is_one_reader(1, 2); }));
            Moody::moods[0].hangs = true;
            CHECK(comes_true([] { return !is_one_reader(0, 1) && is_one_reader(1, 2); }));
            const std::uint64_t reads = Moody::moods[0].reads;
            const std::uint64_t before = Moody::moods[1].reads;
            CHECK(comes_true([&] { return Moody::moods[1].reads > before + 100; }));
            CHECK(Moody::moods[0].reads == reads);
            if (round < 2) Moody::moods[0].hangs = false;
        }
        CHECK(other.stop(10 * kNsPerS));
        const std::int64_t begin_ns = now_ns();
        CHECK(!hung.stop(50 * kMs));
        CHECK(now_ns() - begin_ns < 2 * kNsPerS);
        CHECK(third.stop(10 * kNsPerS));
        CHECK(longest_gap_ns(read_all(other)) < 5 * kNsPerS);  // 0.35 s where CPUs are free
        CHECK(entries_of("/proc/self/task") == threads_before + 1);
    }
    Moody::moods[0].hangs = false;
    CHECK(comes_true([&] { return entries_of("/proc/self/task") == threads_before; }));
}

void readers_stop_a_lane_while_another_keeps_its_leader() {
    const std::size_t threads_before = entries_of("/proc/self/task");
    {
        const auto readers = std::make_shared<pepr::Readers>();
        Sampler hung(Moody::how(0, kMs), readers), other(Moody::how(1, kMs), readers);
        CHECK(comes_true([] { return is_one_reader(0, 1) && Moody::moods[1].reads > 20; }));
        Moody::moods[0].hangs = true;
        CHECK(other.stop(10 * kNsPerS));  // at once: nobody has looked yet
        CHECK(!hung.stop(20 * kMs));
        CHECK(hung.stop(0));  // it was left behind
    }
    Moody::moods[0].hangs = false;
    CHECK(comes_true([&] { return entries_of("/proc/self/task") == threads_before; }));
}

void readers_cycles_leave_nothing_behind() {
    const std::size_t threads = entries_of("/proc/self/task");
    for (int cycle = 0; cycle < 60; ++cycle) {
        const auto readers = std::make_shared<pepr::Readers>();
        std::vector<std::unique_ptr<Sampler>> lanes;
        for (int i = 0; i < Moody::kMoods; ++i)
            lanes.push_back(std::make_unique<Sampler>(Moody::how(i, (i % 2 + 1) * kMs), readers));
        if (cycle % 3 > 0) std::this_thread::sleep_for(std::chrono::milliseconds(cycle));
        std::rotate(lanes.begin(), lanes.begin() + cycle % Moody::kMoods, lanes.end());
        for (const auto& lane : lanes)
            if (cycle % 2 == 0) CHECK(lane->stop(10 * kNsPerS));
    }
    CHECK(entries_of("/proc/self/task") == threads);
}

void readers_read_without_an_allocation() {
    const auto readers = std::make_shared<pepr::Readers>();
    Sampler a(Moody::how(0, kMs), readers), b(Moody::how(1, kMs), readers);
    CHECK(comes_true([] { return is_one_reader(0, 1) && Moody::moods[1].reads > 50; }));
    std::uint64_t allocations_before = 0, reads_before = 0;
    CHECK(comes_true([&] {  // a stretch in which it stays one thread: a busy machine has few
        if (!is_one_reader(0, 1)) return false;
        const std::thread::id reader = Moody::moods[0].reader.load();
        allocations_before = Moody::moods[0].allocations;
        reads_before = Moody::moods[0].reads;
        std::this_thread::sleep_for(std::chrono::milliseconds(50));
        return Moody::moods[0].reader.load() == reader && Moody::moods[0].reads > reads_before &&
               Moody::moods[0].allocations == allocations_before;
    }));
}

// Lanes whose period nobody asked for go along with those that must be read.
void readers_spare_the_wake_ups_of_lanes_that_can_wait() {
    const auto readers = std::make_shared<pepr::Readers>();
    const auto budget = std::make_shared<pepr::CpuBudget>(0.9);
    pepr::Lane::How elastic = Moody::how(1, 20 * kMs);
    elastic.budget = budget;
    Sampler rigid(Moody::how(0, 16 * kMs), readers), other(std::move(elastic), readers);
    CHECK(comes_true([] { return is_one_reader(0, 1) && Moody::moods[1].reads > 20; }));
    const std::int64_t from_ns = now_ns();
    CHECK(comes_true(
        [reads = Moody::moods[1].reads.load()] { return Moody::moods[1].reads > reads + 50; }));
    CHECK(rigid.stop(10 * kNsPerS) && other.stop(10 * kNsPerS));
    const Recorded its = read_all(rigid), theirs = read_all(other);
    std::size_t along = 0, all = 0;
    for (std::size_t i = 0; i + 1 < theirs.t_ns.size(); ++i) {
        if (theirs.t_ns[i] < from_ns) continue;
        ++all;
        const auto at = std::lower_bound(its.t_ns.begin(), its.t_ns.end(), theirs.t_ns[i]);
        const bool before = at != its.t_ns.begin() && theirs.t_ns[i] - *(at - 1) < 2 * kMs;
        along += before || (at != its.t_ns.end() && *at - theirs.t_ns[i] < 2 * kMs);
    }
    CHECK(all >= 50 && along * 10 >= all * 7);  // by chance it would be 1 in 4
}

// Earlier and later together are the whole spacing: whatever the phase, a wake-up of others fits.
void lane_that_can_wait_may_whatever_its_period() {
    for (const std::int64_t period_ns : {20 * kMs, 100 * kMs, kNsPerS, 10 * kNsPerS}) {
        pepr::Lane::How how = Moody::how(0, period_ns);
        how.budget = std::make_shared<pepr::CpuBudget>(0.9);
        pepr::Lane lane(std::move(how), now_ns());
        CHECK(lane.open());
        pepr::CpuLaps laps;
        lane.read(false, laps);
        CHECK(lane.earliest_ns() < lane.due_ns() && lane.due_ns() < lane.latest_ns());
        CHECK(lane.latest_ns() - lane.earliest_ns() == period_ns);
    }
}

// Going along is no reason to be read more often.
void readers_read_lanes_that_can_wait_as_late_as_they_are_due() {
    const auto readers = std::make_shared<pepr::Readers>();
    pepr::Lane::How elastic = Moody::how(1, 40 * kMs);
    elastic.budget = std::make_shared<pepr::CpuBudget>(0.9);
    Sampler rigid(Moody::how(0, 10 * kMs), readers), other(std::move(elastic), readers);
    CHECK(comes_true([] { return is_one_reader(0, 1) && Moody::moods[1].reads > 20; }));
    CHECK(comes_true(
        [reads = Moody::moods[1].reads.load()] { return Moody::moods[1].reads > reads + 20; }));
    CHECK(rigid.stop(10 * kNsPerS) && other.stop(10 * kNsPerS));
    const Recorded rows = read_all(other);
    std::int64_t early = 0;
    for (std::size_t i = 1; i + 1 < rows.t_ns.size(); ++i)
        early += rows.t_ns[i] - rows.t_ns[i - 1] < 35 * kMs;
    CHECK(early * 5 <= static_cast<std::int64_t>(rows.t_ns.size()));  // 0 on a quiet machine
}

// --- the journal: lanes on disk ------------------------------------------------------------------

struct Stream {
    std::size_t batches = 0, stored = 0, read = 0;  // rows that are there, and with those left out
    bool is_ended = false;
};

// Of a stream without a schema, by where Arrow has its numbers.
Stream stream_in(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    const std::string data{std::istreambuf_iterator<char>(file), {}};
    const auto number = [&](std::size_t at, auto value) {
        if (at + sizeof value <= data.size()) std::memcpy(&value, &data[at], sizeof value);
        return static_cast<std::size_t>(value);
    };
    Stream stream;
    for (std::size_t at = 0; at + 8 <= data.size();) {
        const std::size_t metadata = number(at + 4, std::uint32_t{0});
        stream.is_ended = metadata == 0;
        if (stream.is_ended) break;
        const std::size_t rows = number(at + 64, std::uint64_t{0}), body = at + 8 + metadata;
        const std::size_t skipped = body + 8 * rows + (4 * rows + 7) / 8 * 8;
        for (std::size_t row = 0; row < rows; ++row)
            stream.read += number(skipped + 4 * row, std::uint32_t{0});
        stream.read += rows;
        stream.stored += rows;
        ++stream.batches;
        at = body + number(at + 32, std::uint64_t{0});
    }
    return stream;
}

std::shared_ptr<pepr::LaneFile> file_of(const Folder& folder, const char* name) {
    const std::string stem = folder.write(name, "");
    return std::make_shared<pepr::LaneFile>(
        pepr::LaneFile::How{stem, "", {{pepr::ThinRule::Kind::kLine, 0.25}}});
}

void journal_writes_each_row_once_whoever_flushes() {
    const Folder folder;
    const auto notifier = std::make_shared<pepr::Notifier>();
    const auto readers = std::make_shared<pepr::Readers>();
    Sampler a(Moody::how(0, kMs), readers), b(Moody::how(1, kMs), readers);
    CHECK(a.wait_ready(10 * kNsPerS) && b.wait_ready(10 * kNsPerS));
    const auto of_a = file_of(folder, "a"), of_b = file_of(folder, "b");
    pepr::Journal journal(3 * kMs, notifier);
    journal.add(a.lane(), of_a);
    const std::string tail = folder.write("a", "") + ".tail.arrows";
    CHECK(comes_true([&] { return stream_in(tail).read > 0; }));  // by itself
    journal.add(b.lane(), of_b);
    CHECK(comes_true([&] {
        journal.flush();
        return Moody::moods[0].reads > 1500 && Moody::moods[1].reads > 100;
    }));
    CHECK(journal.cpu_ns() > 0);
    CHECK(a.stop(10 * kNsPerS) && b.stop(10 * kNsPerS));
    journal.stop();
    journal.flush();
    for (const auto& [file, sampler, name] : {std::tuple{of_a, &a, "a"}, {of_b, &b, "b"}}) {
        file->flush(true);
        const std::string stem = folder.write(name, "");
        const Stream whole = stream_in(stem + ".arrows");
        CHECK(whole.read + file->lost_rows() == sampler->stats().samples);
        CHECK(whole.is_ended && !fs::exists(stem + ".tail.arrows"));
        CHECK(file->error() == 0 && file->dropped_rows() == 0);
    }
    CHECK(stream_in(folder.write("a", "") + ".arrows").batches > 1);
    CHECK(!notifier->wait(0));
}

void journal_tells_when_a_disk_is_full_and_when_it_is_not() {
    const Folder folder;
    const auto notifier = std::make_shared<pepr::Notifier>();
    Sampler lane(Moody::how(0, kMs));
    CHECK(lane.wait_ready(10 * kNsPerS));
    const auto file = file_of(folder, "a");
    ::signal(SIGXFSZ, SIG_IGN);
    rlimit limit{};
    CHECK(::getrlimit(RLIMIT_FSIZE, &limit) == 0);
    const rlimit little{4096, limit.rlim_max};
    CHECK(::setrlimit(RLIMIT_FSIZE, &little) == 0);
    pepr::Journal journal(2 * kMs, notifier);
    journal.add(lane.lane(), file);
    CHECK(notifier->wait(20 * kNsPerS));
    CHECK(file->error() == EFBIG);
    notifier->clear();
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    CHECK(!notifier->wait(0));  // it still is: nobody is notified
    CHECK(::setrlimit(RLIMIT_FSIZE, &limit) == 0);
    CHECK(notifier->wait(20 * kNsPerS));
    CHECK(file->error() == 0);
    CHECK(lane.stop(10 * kNsPerS));
    journal.stop();
    journal.flush();
    file->flush(true);
    CHECK(file->dropped_rows() == 0);
    CHECK(stream_in(folder.write("a", "") + ".arrows").read == lane.stats().samples);
}

void arrow_file_is_written_over_in_its_own_room_or_left_alone() {
    const Folder folder;
    const std::string path = folder.write("a", "");
    const auto content = [&] {
        std::ifstream file(path, std::ios::binary);
        return std::string{std::istreambuf_iterator<char>(file), {}};
    };
    pepr::ArrowFile file(path, "schema");
    CHECK(file.replace("row") == ENOSPC);  // there is no room yet that would be its own
    CHECK(file.append("first second") == 0);
    CHECK(file.replace("more than there was") == ENOSPC);
    CHECK(content() == "schemafirst second");
    CHECK(file.replace("fewer") == 0);
    CHECK(content() == "schemafewer" && file.size() == content().size());
    CHECK(file.append(" third") == 0 && content() == "schemafewer third");
}

void journal_cycles_leave_nothing_behind_and_a_forked_child_goes() {
    const Folder folder;
    const std::size_t threads = entries_of("/proc/self/task"), files = entries_of("/proc/self/fd");
    {
        Sampler lane(Moody::how(0, kMs));
        CHECK(lane.wait_ready(10 * kNsPerS));
        for (int cycle = 0; cycle < 40; ++cycle) {
            auto journal = std::make_unique<pepr::Journal>(kMs, std::make_shared<pepr::Notifier>());
            journal->add(lane.lane(), file_of(folder, "a"));
            if (cycle % 4 == 0) {
                const pid_t child = ::fork();
                if (child == 0) {
                    ::alarm(10);  // a child that hangs dies of it
                    journal->stop();
                    journal.reset();
                    ::_exit(0);
                }
                int status = -1;
                CHECK(::waitpid(child, &status, 0) == child);
                CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
            }
            if (cycle % 2 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(3));
        }
    }
    CHECK(entries_of("/proc/self/task") == threads && entries_of("/proc/self/fd") == files);
}

// A number that names somebody, among others.
class Visitor final : public pepr::Sensor {
public:
    static std::atomic<double> who;
    Visitor() {
        channels_.push_back({"a/energy", "energy", "J", 1.0, 0.0, true, "test", {}});
        channels_.push_back({"a/pid0", "identity", "1", 1.0, 0.0, false, "test", {}});
    }
    void poll(double* out) noexcept override {
        out[0] = ++count_;
        out[1] = who;
    }

private:
    double count_ = 0;
};

std::atomic<double> Visitor::who{0};

void lane_tells_when_it_reads_of_somebody_else() {
    const auto notifier = std::make_shared<pepr::Notifier>();
    pepr::Lane::How how{"", kMs};
    how.notifier = notifier;
    how.open = [](const std::string&) -> std::unique_ptr<pepr::Sensor> {
        return std::make_unique<Visitor>();
    };
    Visitor::who = 0;
    Sampler lane(std::move(how));
    CHECK(lane.wait_ready(10 * kNsPerS));
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    CHECK(!notifier->wait(0));  // nobody, as before
    for (const double who : {4121.0, 7.0, 0.0}) {
        Visitor::who = who;
        CHECK(notifier->wait(20 * kNsPerS));
        notifier->clear();
        std::int64_t t_ns = 0, read_ns = 0;
        double values[2] = {};
        CHECK(lane.latest({&t_ns, &read_ns, values, 1}) == 1);
        CHECK(values[1] == who);  // what is told can be read already
        Visitor::who = pepr::kUnknown;
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
        CHECK(!notifier->wait(0));  // being unknown for a while is no other process
    }
}

// --- sensors ----------------------------------------------------------------------------------

std::int64_t burn(clockid_t clock, std::int64_t cpu_ns) {
    const std::int64_t begin_ns = pepr::read_clock_ns(clock);
    std::int64_t used_ns = 0;
    while (used_ns < cpu_ns) used_ns = pepr::read_clock_ns(clock) - begin_ns;
    return used_ns;
}

double poll_cpu_s(pepr::Sensor& sensor) {
    std::vector<double> row(sensor.channels().size());
    sensor.poll(row.data());
    return row[0];
}

double seconds(const timeval& t) {
    return static_cast<double>(t.tv_sec) + 1e-6 * static_cast<double>(t.tv_usec);
}

// Runs `work` in a forked child and waits for it; returns the CPU time that the kernel charged it.
double run_child_s(const std::function<void()>& work) {
    const pid_t child = ::fork();
    if (child == 0) {
        work();
        ::_exit(0);
    }
    rusage usage{};
    int status = -1;
    CHECK(::wait4(child, &status, 0, &usage) == child && status == 0);
    return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

// What a hypervisor steals from a running thread is in perf's count until /proc/stat tells it, in
// ticks of 10 ms for each of two threads.
constexpr double kStolenS = 0.02;

void processes_self_counts_threads() {
    const auto sensor = pepr::open_sensor("processes:self");
    CHECK(sensor->channels().at(0).name == "job/cpu");
    std::atomic<std::int64_t> burnt_ns{0};
    const std::int64_t clock_before_ns = pepr::read_clock_ns(CLOCK_PROCESS_CPUTIME_ID);
    const double before_s = poll_cpu_s(*sensor);
    std::vector<std::thread> threads;
    for (int i = 0; i < 2; ++i)
        threads.emplace_back([&] { burnt_ns += burn(CLOCK_THREAD_CPUTIME_ID, 150 * kMs); });
    for (std::thread& thread : threads) thread.join();
    const double counted_s = poll_cpu_s(*sensor) - before_s;
    const std::int64_t clock_ns = pepr::read_clock_ns(CLOCK_PROCESS_CPUTIME_ID) - clock_before_ns;
    CHECK(counted_s >= 1e-9 * static_cast<double>(burnt_ns.load()));
    CHECK(counted_s <= 1e-9 * static_cast<double>(clock_ns) + kStolenS);
}

void processes_count_children_that_were_waited_for() {
    const auto self = pepr::open_sensor("processes:self");
    const auto children = pepr::open_sensor("processes:children");
    const double self_before_s = poll_cpu_s(*self), children_before_s = poll_cpu_s(*children);
    const double charged_s = run_child_s([] { burn(CLOCK_PROCESS_CPUTIME_ID, 250 * kMs); });
    CHECK(charged_s >= 0.24);
    CHECK(std::abs(poll_cpu_s(*children) - children_before_s - charged_s) < kStolenS);
    // Ourselves, who only waited, come on top.
    CHECK(poll_cpu_s(*self) - self_before_s >= charged_s - 0.001);
    CHECK(poll_cpu_s(*self) - self_before_s < charged_s + 0.05);
}

void processes_children_leave_us_out() {
    const auto children = pepr::open_sensor("processes:children");
    const double before_s = poll_cpu_s(*children);
    burn(CLOCK_PROCESS_CPUTIME_ID, 100 * kMs);
    CHECK(poll_cpu_s(*children) - before_s < kStolenS);  // of 0.1 s: two clocks, and what is stolen
}

void processes_pids_count_from_the_open_on() {
    int clocks[2], go[2];
    CHECK(::pipe(clocks) == 0 && ::pipe(go) == 0);
    const pid_t child = ::fork();
    if (child == 0) {
        const pid_t grandchild = ::fork();
        const auto burn_and_tell = [&] {
            burn(CLOCK_PROCESS_CPUTIME_ID, 100 * kMs);
            const std::int64_t ns = pepr::read_clock_ns(CLOCK_PROCESS_CPUTIME_ID);
            if (::write(clocks[1], &ns, sizeof ns) != sizeof ns) ::_exit(1);
        };
        ::close(go[1]);
        burn_and_tell();
        char byte = 0;
        if (::read(go[0], &byte, 1) != 0) ::_exit(1);
        burn_and_tell();
        int status = 0;
        if (grandchild > 0) ::waitpid(grandchild, &status, 0);
        ::_exit(status);
    }
    const auto sum_of_two = [&] {
        std::int64_t ns[2] = {};
        for (std::int64_t& value : ns)
            CHECK(::read(clocks[0], &value, sizeof value) == sizeof value);
        return 1e-9 * static_cast<double>(ns[0] + ns[1]);
    };
    const double before_s = sum_of_two();
    const auto sensor = pepr::open_sensor("processes:pids=" + std::to_string(child));
    std::vector<double> row(sensor->channels().size());
    sensor->poll(row.data());
    CHECK(row[0] < 0.01 && row[2] == 2.0);
    ::close(go[1]);
    const double used_s = sum_of_two() - before_s;
    int status = -1;
    CHECK(::waitpid(child, &status, 0) == child && status == 0);
    sensor->finish();
    sensor->poll(row.data());
    if (sensor->notes().empty()) CHECK(row[0] > used_s - 0.005);  // perf
    CHECK(row[0] < used_s + 0.1);  // the rest is what it takes to end
    CHECK(row[2] == 0.0);
    for (const int fd : {clocks[0], clocks[1], go[0]}) ::close(fd);
}

// While one child lives, another is born and ends, and then none is left.
void processes_are_read_without_an_allocation() {
    int hold[2];
    CHECK(::pipe(hold) == 0);
    const auto sensor = pepr::open_sensor("processes:self");
    std::vector<double> row(sensor->channels().size());
    const pid_t stays = ::fork();
    if (stays == 0) {
        char byte = 0;
        ::close(hold[1]);
        ::_exit(::read(hold[0], &byte, 1) == 0 ? 0 : 1);
    }
    const std::uint64_t before = allocations;
    for (int i = 0; i < 5; ++i) {
        sensor->poll(row.data());
        if (i > 1) CHECK(row[2] == 2.0);
    }
    const pid_t ends = ::fork();
    if (ends == 0) ::_exit(0);
    sensor->poll(row.data());
    int status = -1;
    CHECK(::waitpid(ends, &status, 0) == ends);
    ::close(hold[1]);
    CHECK(::waitpid(stays, &status, 0) == stays && status == 0);
    sensor->finish();
    sensor->poll(row.data());
    CHECK(allocations == before);
    CHECK(row[2] == 1.0);
    ::close(hold[0]);
}

// A tree on two CPUs in virtual time, 10 polls a second for 100 s, of which a hypervisor steals.
struct Stolen {
    double share;          // of the time that its tasks run
    int changes_each = 0;  // polls
    double unseen_s = 0;   // a poll, or a change, of processes that nobody ever saw
    double setuid_s = 0;   // a poll, which the count is blind to
    double noise_s = 0;    // between the reads of the count and of the clocks
    double others_s = 0;   // a poll, stolen of other programs
};

struct Told {
    double cpu_s, truth_s, stolen_s;
    int asked = 0;  // how often what was stolen was asked for
};

Told tell(const Stolen& load) {
    constexpr double kTick_s = 0.01, kBefore_s = 11.67;
    std::mt19937 random(5);
    std::uniform_real_distribution<double> noise_s(0, load.noise_s);
    pepr::Reconciled reconciled(kBefore_s, kTick_s);
    Told told{0, 0, 0};
    double count_s = 0, clocks_s = 0, unseen_s = 0;
    for (int poll = 0; poll < 1000; ++poll) {
        const bool changed = load.changes_each > 0 && poll % load.changes_each == 0;
        const double ran_s = poll > 0 ? 0.2 : 0.0;
        if (changed || load.changes_each == 0) unseen_s += load.unseen_s;
        told.stolen_s += load.share * ran_s + load.others_s;
        clocks_s += (1 - load.share) * ran_s + load.setuid_s;
        count_s += ran_s;
        told.truth_s = clocks_s + unseen_s;
        const auto stolen_s = [&] {
            ++told.asked;
            return kBefore_s + kTick_s * std::floor(told.stolen_s / kTick_s);
        };
        told.cpu_s = reconciled.take(count_s + unseen_s + noise_s(random), clocks_s,
                                     poll == 0 || changed, stolen_s);
    }
    return told;
}

void cpu_time_is_without_what_was_stolen() {
    for (const double share : {0.001, 0.015, 0.3}) {
        const Told told = tell({share});
        CHECK(std::abs(told.cpu_s - told.truth_s) < 0.021);  // a tick, and one that was not told
        CHECK(told.asked <= 1000 * std::min(1.0, share * 0.2 / 0.01));
        // given births or deaths, what was stolen since the last poll cannot be told from theirs
        const Told busy = tell({share, 10});
        CHECK(busy.cpu_s - busy.truth_s > -0.001);
        CHECK(busy.cpu_s - busy.truth_s < 0.11 * busy.stolen_s + 0.021);
    }
}

void cpu_time_that_was_not_stolen_is_kept() {
    const Told unseen = tell({0, 0, 0.005});
    CHECK(std::abs(unseen.cpu_s - unseen.truth_s) < 1e-9);
    const Told setuid = tell({0, 0, 0, 0.01});
    CHECK(std::abs(setuid.cpu_s - setuid.truth_s) < 1e-9 && setuid.asked == 0);
    // no more than was stolen is taken off
    const Told both = tell({0.01, 0, 0.005});
    CHECK(both.truth_s - both.cpu_s < 1e-9 && both.cpu_s - both.truth_s < both.stolen_s);
    // nor for what began and ended unseen while others did, whatever was stolen of other programs
    const Told born = tell({0, 10, 0.05, 0, 0, 0.02});
    CHECK(std::abs(born.cpu_s - born.truth_s) < 1e-9);
    const Told still = tell({0, 0, 0, 0, 0.002});
    CHECK(std::abs(still.cpu_s - still.truth_s) < 0.0021 && still.asked == 0);
}

// The time of a machine, by files of ours in place of the kernel's.
void machine_time_is_of_the_whole_machine() {
    const Folder folder;
    const fs::path root = fs::path(folder.write("here", "")).parent_path();
    const auto write = [&](const std::string& name, const std::string& text) {
        fs::create_directories((root / name).parent_path());
        std::ofstream(root / name) << text;
    };
    const auto close = [](double value, double expected) {
        return std::abs(value - expected) < 1e-6;
    };
    CHECK(!pepr::MachineTime(root.string()));
    write("proc/stat", "cpu  1000 200 300 9999 77 1 4 50 600 60\ncpu0 1 2 3 4 5 6 7 8 9 10\n");
    {
        pepr::MachineTime machine(root.string());
        CHECK(machine && close(machine.busy_s(), 15.05) && close(machine.stolen_s(), 0.5));
        write("proc/stat", "cpu  1100 200 300 9999 77 1 4 60 600 60\n");
        CHECK(close(machine.busy_s(), 16.05) && close(machine.stolen_s(), 0.6));
    }
    const std::string told =
        "usage_usec 16999999\nuser_usec 13001234\nsystem_usec 3050000\nnice_usec 2000000\n";
    for (const char* place : {"sys/fs/cgroup/unified/", "sys/fs/cgroup/"}) {
        write(std::string(place) + "cpu.stat", told);
        pepr::MachineTime machine(root.string());
        CHECK(close(machine.busy_s(), 16.051234) && close(machine.stolen_s(), 0.6));
        write(std::string(place) + "cgroup.type", "domain\n");  // a container's own
        CHECK(close(pepr::MachineTime(root.string()).busy_s(), 16.05));
    }
    fs::remove(root / "sys/fs/cgroup/cgroup.type");
    write("sys/fs/cgroup/cpu.stat", "nr_periods 0\nnr_throttled 0\n");
    CHECK(close(pepr::MachineTime(root.string()).busy_s(), 16.05));
    write("proc/stat", "cpu  1100 200\n");
    pepr::MachineTime torn(root.string());
    CHECK(std::isnan(torn.busy_s()) && std::isnan(torn.stolen_s()));
}

void replay_names_the_bad_line() {
    const Folder folder;
    const std::string path =
        folder.write("bad", "# comment\n" + std::string(kChannels) + "0\t1\t2\n0.1\t1\n");
    try {
        pepr::open_sensor("replay:" + path);
        CHECK(!"opened a file with a bad line");
    } catch (const pepr::SensorError& error) {
        CHECK(std::string(error.what()).find(path + ":5") != std::string::npos);
    }
}

// --- files that are damaged ---------------------------------------------------------------------

// The text with a few of its bytes changed, doubled, cut out or cut off.
std::string damaged(std::string text, std::mt19937& random) {
    static const char* const kOdd[] = {"nan", "inf", "-1", "1e999", "\t", "\n", "=", "\xff", "0x9"};
    const auto any = [&random](std::size_t n) { return n > 0 ? random() % n : 0; };
    for (std::size_t changes = 1 + any(3); changes > 0; --changes) {
        const std::size_t at = any(text.size());
        switch (any(5)) {
            case 0: text.insert(at, kOdd[any(std::size(kOdd))]); break;
            case 1: text.erase(at, any(8)); break;
            case 2: text.insert(at, text.substr(any(text.size()), any(40))); break;
            case 3: text.resize(at); break;
            default:
                if (!text.empty()) text[at] = static_cast<char>(random());
        }
    }
    return text;
}

// Whatever a file holds, a sensor opens and is read, or says what, why and the fix.
void open_and_read(const std::string& spec, int& opened) {
    try {
        const auto sensor = pepr::open_sensor(spec);
        std::vector<double> row(sensor->channels().size());
        sensor->poll(row.data());
        for (const pepr::Channel& channel : sensor->channels())
            CHECK(std::isfinite(channel.scale) && channel.modulus >= 0);
        ++opened;
    } catch (const pepr::SensorError& error) {
        CHECK(*error.what() != '\0' && !error.note.why.empty() && !error.note.fix.empty());
    }
}

void replays_that_are_damaged_are_read_or_refused() {
    const Folder folder;
    std::mt19937 random(1);
    int opened = 0;
    for (int i = 0; i < 2000; ++i) {
        const std::string text = std::string(kChannels) + "0\t1\t2\n0.1\t1.5\tnan\n1e3\t2\t-3\n";
        open_and_read("replay:" + folder.write("odd", damaged(text, random)), opened);
    }
    CHECK(opened > 100 && opened < 1900);
}

void sysfs_that_is_damaged_is_read_or_refused() {
    const Folder folder;
    const fs::path root = folder.write("here", "");
    const fs::path zone = root.parent_path() / "powercap" / "intel-rapl:0";
    const fs::path chip = root.parent_path() / "hwmon" / "hwmon0";
    fs::create_directories(zone);
    fs::create_directories(chip);
    const std::pair<fs::path, const char*> files[] = {
        {zone / "name", "package-0\n"},          {zone / "energy_uj", "4711\n"},
        {zone / "max_energy_range_uj", "65\n"},  {chip / "name", "amdgpu\n"},
        {chip / "power1_average", "25000000\n"}, {chip / "power1_label", "PPT\n"},
        {chip / "energy1_input", "123456\n"},
    };
    std::mt19937 random(2);
    int opened = 0;
    for (int i = 0; i < 300; ++i) {
        for (const auto& [path, text] : files) {
            std::ofstream(path) << (random() % 2 ? damaged(text, random) : text);
            if (random() % 16 == 0) fs::remove(path);
        }
        open_and_read("powercap:" + zone.parent_path().string(), opened);
        open_and_read("hwmon:" + chip.parent_path().string(), opened);
    }
    CHECK(opened > 100);
}

struct Test {
    const char* name;
    void (*run)();
};

#define TEST(name) \
    Test { #name, name }
constexpr Test kTests[] = {
    TEST(ring_keeps_order_in_batches),
    TEST(ring_wraps_without_loss_for_a_reader_that_keeps_up),
    TEST(ring_counts_laps_exactly_for_each_reader),
    TEST(ring_without_channels_still_tells_times),
    TEST(ring_gives_whole_rows_to_slow_readers_of_a_fast_producer),
    TEST(ring_drops_what_is_overwritten_during_a_copy),
    TEST(ring_is_read_whole_by_another_process),
    TEST(ring_that_is_shared_cannot_be_changed_by_its_readers),
    TEST(ring_finds_the_row_that_an_instant_lies_in),
    TEST(ring_that_cannot_be_made_unmaps_nothing),
    TEST(coarse_energy_telescopes_and_comes_seldom),
    TEST(cadence_reads_just_after_each_refresh),
    TEST(cadence_holds_against_jitter_about_a_clock),
    TEST(cadence_learns_anew_when_a_sensor_changes_its_pace),
    TEST(cadence_reads_several_devices_once_a_refresh),
    TEST(cadence_follows_the_fastest_of_unlike_devices),
    TEST(cadence_keeps_to_its_base_where_each_read_brings_news),
    TEST(cadence_reads_steady_power_more_seldom_until_it_changes),
    TEST(cadence_does_not_take_rest_for_a_slow_sensor),
    TEST(cadence_searches_a_dead_counter_for_a_while_only),
    TEST(cadence_never_sleeps_through_half_a_range),
    TEST(cadence_is_not_misled_by_unknown_values),
    TEST(budget_is_kept_by_stretching_all_lanes_alike),
    TEST(budget_is_kept_by_those_that_wait_for_no_refresh_first),
    TEST(budget_gives_half_to_those_that_wait_for_no_refresh),
    TEST(budget_follows_what_a_lane_would_like),
    TEST(budget_that_suffices_stretches_nothing),
    TEST(budget_too_small_still_reads_before_a_gap),
    TEST(budget_does_not_count_the_start),
    TEST(sampler_follows_what_it_reads),
    TEST(sampler_that_is_held_back_still_sees_every_wrap),
    TEST(sampler_takes_its_last_sample_at_once),
    TEST(sampler_stopped_before_it_is_open_still_samples_once),
    TEST(sampler_forgets_no_deadline),
    TEST(sampler_tells_others_coarsely_and_from_the_same_reads),
    TEST(sampler_counts_what_is_unknown),
    TEST(sampler_that_never_opens_is_given_up_in_time),
    TEST(sampler_left_behind_outlives_its_owner),
    TEST(sampler_rethrows_why_it_failed),
    TEST(sampler_cycles_leave_nothing_behind),
    TEST(sampler_lets_a_forked_child_go),
    TEST(readers_read_quick_lanes_by_one_thread_and_slow_ones_by_another),
    TEST(readers_go_on_when_a_driver_keeps_its_leader),
    TEST(readers_stop_a_lane_while_another_keeps_its_leader),
    TEST(readers_cycles_leave_nothing_behind),
    TEST(readers_read_without_an_allocation),
    TEST(readers_spare_the_wake_ups_of_lanes_that_can_wait),
    TEST(lane_that_can_wait_may_whatever_its_period),
    TEST(readers_read_lanes_that_can_wait_as_late_as_they_are_due),
    TEST(journal_writes_each_row_once_whoever_flushes),
    TEST(journal_tells_when_a_disk_is_full_and_when_it_is_not),
    TEST(arrow_file_is_written_over_in_its_own_room_or_left_alone),
    TEST(journal_cycles_leave_nothing_behind_and_a_forked_child_goes),
    TEST(lane_tells_when_it_reads_of_somebody_else),
    TEST(processes_self_counts_threads),
    TEST(processes_count_children_that_were_waited_for),
    TEST(processes_children_leave_us_out),
    TEST(processes_pids_count_from_the_open_on),
    TEST(processes_are_read_without_an_allocation),
    TEST(cpu_time_is_without_what_was_stolen),
    TEST(cpu_time_that_was_not_stolen_is_kept),
    TEST(machine_time_is_of_the_whole_machine),
    TEST(replay_names_the_bad_line),
    TEST(replays_that_are_damaged_are_read_or_refused),
    TEST(sysfs_that_is_damaged_is_read_or_refused),
};

bool passes(const Test& test) {
    failures.store(0);
    try {
        test.run();
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s: threw %s\n", test.name, error.what());
        failures.fetch_add(1);
    }
    std::printf("%s %s\n", failures.load() == 0 ? "ok  " : "FAIL", test.name);
    std::fflush(stdout);  // a forked child would print it again
    return failures.load() == 0;
}

}  // namespace

int main(int argc, char** argv) {
    int passed = 0, failed = 0;
    for (const Test& test : kTests) {
        if (argc > 1 && std::strstr(test.name, argv[1]) == nullptr) continue;
        passes(test) ? ++passed : ++failed;
    }
    std::printf("%d passed, %d failed\n", passed, failed);
    return failed == 0 && passed > 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
