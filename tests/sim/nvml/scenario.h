#pragma once

#include <nvml.h>

#include <atomic>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "waves.h"

namespace pepr::sim {

// The shortest sample period that nvml.h names for utilization.
inline constexpr double kUtilizationPeriod_s = 1.0 / 6.0;
// How many sample periods the driver remembers (a choice: nvml.h does not say).
inline constexpr double kUtilizationMemory = 20;
inline constexpr double kForever_s = std::numeric_limits<double>::infinity();

struct Process {
    unsigned pid = 0;  // 0: whatever the program that asks has started
    unsigned long long used_bytes = 0;
    double sm = 0, mem = 0;  // fractions
    double start_s = -kForever_s, end_s = kForever_s;
    unsigned instance = 0xFFFFFFFF;  // of MIG
    bool mps = false;                // a client of MPS: only the list of those has it

    bool runs(double t_s) const { return start_s <= t_s && t_s < end_s; }
};

// What the board's sensors are like (MEASUREMENT.md, B). Times in seconds.
struct Sensor {
    double refresh_s = 0.1, window_s = 0.025, phase_s = 0, average_s = 1;
    bool averages = true;  // nvmlDeviceGetPowerUsage: the average, or the instant
    double counter_refresh_s = 0.1, samples_refresh_s = 0.02;
    // Power is shown so late, and behind a low pass if smoothing_s is not 0; the counter so late.
    double delay_s = 0, smoothing_s = 0, counter_delay_s = 0;
    double gain = 1, offset_w = 0, counter_gain = 1, counter_offset_w = 0;

    double last_refresh_s(double t_s, double period_s) const {
        return std::floor((t_s - phase_s) / period_s) * period_s + phase_s;
    }
};

struct Gpu {
    unsigned index = 0;
    std::string uuid, name;
    Wave power;
    std::unique_ptr<Wave> module;   // scope 1; none on most boards
    std::unique_ptr<Wave> counted;  // what the counter adds up, if not `power`
    Sensor sensor;
    double counter_start_mj = 0;
    std::vector<double> resets_s;
    Wave utilization, memory_utilization, memory_used_bytes;
    unsigned long long memory_total_bytes = 0, memory_reserved_bytes = 0;
    std::vector<Process> processes;
    std::string processes_file;  // more of them, looked up at each call
    double power_limit_w = 0;    // 0: the board states none
    int mig = 0;                 // NVML_DEVICE_MIG_*, or -1: this board has no MIG

    unsigned instant_mw(const Wave& wave, double t_s) const;
    unsigned average_mw(const Wave& wave, double t_s) const;
    // What was sampled at instants of the driver's own, faster buffer.
    unsigned sample_mw(double at_s) const;
    unsigned long long counter_mj(double t_s) const;
    unsigned long long used_bytes(double t_s) const;
    // Each process of its own, those of the file and the asking program's children included.
    std::vector<Process> present() const;
    // Percent over the last sample period.
    unsigned percent(const Wave& fraction, double t_s) const;

private:
    unsigned window_mw(const Wave& wave, double end_s, double window_s) const;
};

enum class Effect { kReturn, kZero, kHang, kSlow };

struct Fault {
    std::string function;  // a prefix: "nvmlDevice" is every call on a device
    double start_s = -kForever_s, end_s = kForever_s;
    int gpu = -1, field = -1;  // -1: any
    unsigned every = 1;
    Effect effect = Effect::kReturn;
    double argument = 0;                     // the code, or the delay in seconds
    mutable std::atomic<unsigned> calls{0};  // relaxed: a count, it orders nothing

    bool concerns(const char* name, int on_gpu, int on_field) const;
    bool hits(double t_s) const;
};

// What a call has to do before, or instead of, answering.
struct Verdict {
    nvmlReturn_t code = NVML_SUCCESS;
    bool zero = false;
};

class Scenario {
public:
    // Throws std::runtime_error naming the file and the line.
    explicit Scenario(const std::string& path);

    double now_s() const { return static_cast<double>(monotonic_ns() - epoch_ns_) * 1e-9; }
    // The same instant in NVML's timestamps: µs since 1970. Fixed at init: equal instants stay
    // equal.
    long long unix_us(double t_s) const {
        return unix_epoch_us_ + static_cast<long long>(std::round(t_s * 1e6));
    }
    double since_epoch_s(unsigned long long unix_us) const {
        return 1e-6 * static_cast<double>(static_cast<long long>(unix_us) - unix_epoch_us_);
    }
    // Suffers the delays and hangs of every fault that matches, then says what remains.
    Verdict consult(const char* function, int gpu = -1, int field = -1) const;

    std::string driver_version = "580.65.06";
    std::vector<std::unique_ptr<Gpu>> gpus;

private:
    void directive(Line& line);
    void of_gpu(const std::string& key, Line& line, Gpu& gpu);

    long long epoch_ns_, unix_epoch_us_ = 0;
    std::vector<std::unique_ptr<Fault>> faults_;
};

}  // namespace pepr::sim
