// The core's own tests, without Python: what the sanitizers run (make sanitize).
//
//   core_test [PART OF A NAME]

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <filesystem>
#include <fstream>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "clock.h"
#include "ring.h"
#include "sampler.h"
#include "sensor.h"

namespace fs = std::filesystem;
using pepr::kNsPerS;
using pepr::now_ns;
using pepr::Ring;
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
    Reader(const Ring& ring, std::size_t stride)
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
    const Ring& ring_;
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
        return std::strlen(error.what()) > 0 && !error.why.empty() && !error.hint.empty();
    }
    return false;
}

void sampler_takes_its_last_sample_at_once() {
    const Folder folder;
    Sampler sampler(two_channels(folder), 3600 * kNsPerS);
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

void sampler_stopped_before_it_is_open_still_samples_once() {
    const Folder folder;
    Sampler sampler(two_channels(folder), 3600 * kNsPerS);
    CHECK(sampler.stop(10 * kNsPerS));
    CHECK(read_all(sampler).t_ns.size() >= 1);
}

void sampler_forgets_no_deadline() {
    const Folder folder;
    constexpr std::int64_t kPeriodNs = kMs;
    Sampler sampler(two_channels(folder), kPeriodNs);
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

void sampler_counts_what_is_unknown() {
    const Folder folder;
    const std::string path =
        folder.write("nan", std::string(kChannels) + "0\t1\tnan\n0.1\tnan\tnan\n0.3\t3\t4\n");
    Sampler sampler("replay:" + path, 2 * kMs);
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
    Sampler sampler(driver.spec(), kMs);
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
        const Sampler sampler(driver.spec(), kMs);
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
                             "magic", "processes:", "processes:parents"}) {
        Sampler sampler(spec, kMs);
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
        Sampler sampler(spec, kMs);
        if (cycle % 3 == 0) CHECK(sampler.wait_ready(10 * kNsPerS));
        if (cycle % 2 == 0) CHECK(sampler.stop(10 * kNsPerS));
    }
    CHECK(entries_of("/proc/self/fd") == files);
    CHECK(entries_of("/proc/self/task") == threads);
}

void sampler_lets_a_forked_child_go() {
    const Folder folder;
    auto sampler = std::make_unique<Sampler>(two_channels(folder), kMs);
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
    CHECK(counted_s <= 1e-9 * static_cast<double>(clock_ns));
}

void processes_count_children_that_were_waited_for() {
    const auto self = pepr::open_sensor("processes:self");
    const auto children = pepr::open_sensor("processes:children");
    const double self_before_s = poll_cpu_s(*self), children_before_s = poll_cpu_s(*children);
    const double charged_s = run_child_s([] { burn(CLOCK_PROCESS_CPUTIME_ID, 250 * kMs); });
    CHECK(charged_s >= 0.24);
    CHECK(std::abs(poll_cpu_s(*children) - children_before_s - charged_s) < 0.001);
    // Ourselves, who only waited, come on top.
    CHECK(poll_cpu_s(*self) - self_before_s >= charged_s - 0.001);
    CHECK(poll_cpu_s(*self) - self_before_s < charged_s + 0.05);
}

void processes_children_leave_us_out() {
    const auto children = pepr::open_sensor("processes:children");
    const double before_s = poll_cpu_s(*children);
    burn(CLOCK_PROCESS_CPUTIME_ID, 100 * kMs);
    CHECK(poll_cpu_s(*children) == before_s);
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
    TEST(sampler_takes_its_last_sample_at_once),
    TEST(sampler_stopped_before_it_is_open_still_samples_once),
    TEST(sampler_forgets_no_deadline),
    TEST(sampler_counts_what_is_unknown),
    TEST(sampler_that_never_opens_is_given_up_in_time),
    TEST(sampler_left_behind_outlives_its_owner),
    TEST(sampler_rethrows_why_it_failed),
    TEST(sampler_cycles_leave_nothing_behind),
    TEST(sampler_lets_a_forked_child_go),
    TEST(processes_self_counts_threads),
    TEST(processes_count_children_that_were_waited_for),
    TEST(processes_children_leave_us_out),
    TEST(replay_names_the_bad_line),
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
