// What the core's tests share: checks, and sensors and files to test with.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "sampling/sampler.h"
#include "sensors/sensor.h"
#include "system/clock.h"

namespace fs = std::filesystem;

using pepr::kNsPerS;
using pepr::now_ns;
using pepr::Ring;
using pepr::RingView;
using pepr::Sampler;

constexpr std::int64_t kMs = 1'000'000;

// --- checks --------------------------------------------------------------------------------------

struct Test {
    Test(const char* file, const char* name, void (*run)());
    const char* file;
    const char* name;
    void (*run)();
};

// Defines a test and registers it with main.cpp.
#define TEST(name)                                        \
    static void name();                                   \
    static const Test test_##name(__FILE__, #name, name); \
    static void name()

void check(bool holds, const char* condition, const char* file, int line);
#define CHECK(condition) check((condition), #condition, __FILE__, __LINE__)

// How often this thread has allocated memory.
extern thread_local std::uint64_t allocations;

inline bool near(std::int64_t value, std::int64_t expected, double by) {
    return std::abs(static_cast<double>(value - expected)) <= by * static_cast<double>(expected);
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

// Runs `work` in a forked child. Returns whether it returned true.
inline bool holds_in_a_child(const std::function<bool()>& work) {
    const pid_t child = ::fork();
    if (child == 0) ::_exit(work() ? 0 : 1);
    int status = -1;
    CHECK(::waitpid(child, &status, 0) == child);
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

inline std::size_t entries_of(const char* folder) {
    return static_cast<std::size_t>(
        std::distance(fs::directory_iterator(folder), fs::directory_iterator()));
}

inline std::size_t thread_count() { return entries_of("/proc/self/task"); }

// The kernel lists a thread for a moment after it was joined.
inline bool thread_count_becomes(std::size_t count) {
    return comes_true([count] { return thread_count() == count; });
}

// --- sensors and files ---------------------------------------------------------------------------

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

// The head of a replay file with two channels.
constexpr const char* kChannels =
    "channel\ta\tenergy\tJ\t1\t0\tcounter\treplay\tzone=x\n"
    "channel\tb\tpower\tW\t0.001\t0\tgauge\treplay\n";

// A sensor that hangs or takes its time when a test says so, and notes which thread reads it.
class FakeSensor final : public pepr::Sensor {
public:
    static constexpr int kCount = 4;
    struct State {
        std::atomic<std::int64_t> takes_ns{0};
        std::atomic<bool> hangs{false};
        std::atomic<std::thread::id> reader{};
        std::atomic<std::uint64_t> reads{0}, allocations{0};
    };
    static State states[kCount];

    static std::unique_ptr<pepr::Sensor> open(const std::string& spec) {
        return std::make_unique<FakeSensor>(states[std::stoi(spec)]);
    }
    static pepr::Lane::Options options(int which, std::int64_t period_ns) {
        State& state = states[which];
        state.takes_ns = 0;
        state.hangs = false;
        state.reads = state.allocations = 0;
        pepr::Lane::Options options{std::to_string(which), period_ns};
        options.open = open;
        return options;
    }

    explicit FakeSensor(State& state) : state_(state) {
        channels_.push_back({"a/energy", "energy", "J", 1.0, 0.0, true, "test", {}});
    }
    void poll(double* out) noexcept override {
        state_.reader = std::this_thread::get_id();
        state_.allocations = allocations;
        const std::int64_t begin_ns = now_ns();
        while (state_.hangs) std::this_thread::sleep_for(std::chrono::milliseconds(1));
        while (now_ns() - begin_ns < state_.takes_ns) {
        }
        *out = static_cast<double>(++state_.reads);
    }

private:
    State& state_;
};

inline FakeSensor::State FakeSensor::states[FakeSensor::kCount];

struct Recorded {
    std::vector<std::int64_t> t_ns, read_ns;
    std::vector<std::vector<double>> columns;
};

// All rows of a sampler that have not been read yet.
inline Recorded read_all(Sampler& sampler) {
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
