// One sensor and its ring: how it is opened, when it is read, and what the reads cost.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "sampling/budget.h"
#include "sampling/cadence.h"
#include "sampling/coarse.h"
#include "sampling/ring.h"
#include "sensors/sensor.h"
#include "system/clock.h"
#include "system/notifier.h"

namespace pepr {

// The CPU time of the calling thread, lap by lap; the first lap begins with the thread.
class CpuLaps {
public:
    std::int64_t lap_ns() noexcept {
        const std::int64_t before_ns = at_ns_;
        at_ns_ = read_clock_ns(CLOCK_THREAD_CPUTIME_ID);
        return at_ns_ - before_ns;
    }

private:
    std::int64_t at_ns_ = 0;
};

// A lane has no thread of its own: the threads of Readers read it, one at a time.
class Lane {
public:
    enum class State : std::uint32_t { kOpening, kRunning, kStopped, kFailed };

    struct Stats {
        std::uint64_t samples;        // rows written to the ring
        std::uint64_t late;           // rows begun more than half a period after their deadline
        std::uint64_t skipped;        // deadlines missed because a read outlasted the period
        std::uint64_t failed_reads;   // numbers that were unknown
        std::uint64_t lost;           // rows overwritten before this reader read them
        std::int64_t cpu_ns;          // CPU time of its reads and their wake-ups
        std::uint64_t settled;        // rows read since the refresh periods are known
        std::uint64_t wasted;         // of these, rows in which no watched number had changed
        std::int64_t refresh_ns;      // the shortest refresh period learnt; 0: none
        std::int64_t min_spacing_ns;  // the least time between reads that the budget allows; 0: any
    };

    struct Options {
        std::string spec;
        // If `learn`: reads follow the refreshes, and come every period_ns only until these are
        // known. Else they come every period_ns. A budget may make either less frequent.
        std::int64_t period_ns;
        bool learn = false;
        std::shared_ptr<CpuBudget> budget = nullptr;
        // Also writes coarse rows, into a second ring.
        std::optional<Coarse> coarse = std::nullopt;
        // The thread that opens the sensor then drops all its capabilities.
        bool drop_capabilities = false;
        // Notified when a number whose quantity is "identity" changes.
        std::shared_ptr<Notifier> notifier = nullptr;
        std::unique_ptr<Sensor> (*open)(const std::string& spec) = open_sensor;
    };

    // Reads at a fixed period come at `epoch_ns` plus multiples of it, so that lanes coincide.
    Lane(Options options, std::int64_t epoch_ns);

    // --- for the thread that reads it ---

    // Opens the sensor, which may take seconds. False if it failed: see `state`, require_open().
    bool open() noexcept;
    // Takes a sample and plans the next one. `last`: there will be no other, so read everything.
    void read(bool last, CpuLaps& laps) noexcept;
    // Adds the CPU time since the last lap to this lane.
    void charge(CpuLaps& laps) noexcept;
    // When to read next. A lane with slack may be read earlier or later, to spare a wake-up: nobody
    // asked for its period, and it follows no refresh.
    std::int64_t due_ns() const noexcept { return due_ns_; }
    std::int64_t earliest_ns() const noexcept { return earliest_ns_; }
    std::int64_t latest_ns() const noexcept { return latest_ns_; }
    bool has_slack() const noexcept { return earliest_ns_ < latest_ns_; }
    std::int64_t took_ns() const noexcept { return took_ns_; }  // the last read

    // --- for any thread ---

    State state() const noexcept {
        return static_cast<State>(state_.load(std::memory_order_acquire));
    }
    // Waits while the lane is in that state. False if it still is at the deadline.
    bool wait_while_in(State state, std::int64_t deadline_ns) const noexcept;
    // The time between the last read and the next one, as planned.
    std::int64_t spacing_ns() const noexcept { return spacing_ns_.load(std::memory_order_relaxed); }
    Stats stats(std::uint64_t lost) const noexcept;
    // Rethrows what the sensor threw. Throws SensorError while it is still opening.
    void require_open() const;

    // --- for any thread, once it is open ---

    const Sensor& sensor() const noexcept { return *sensor_; }
    const Ring& ring() const noexcept { return *ring_; }
    const Ring* coarse_ring() const noexcept { return coarse_ring_.get(); }

private:
    void enter(State next) noexcept;
    std::unique_ptr<Ring> make_ring(std::int64_t spacing_ns) const;
    bool identity_changed() noexcept;
    bool is_flexible() const noexcept;
    void plan(std::int64_t begin_ns, std::int64_t end_ns) noexcept;
    std::int64_t next_on_grid(std::int64_t begin_ns, std::int64_t end_ns) noexcept;
    std::int64_t next_by_cadence(std::int64_t begin_ns, std::int64_t end_ns) noexcept;
    void end_window(std::int64_t t_ns, CpuLaps& laps) noexcept;
    void count_sample(std::int64_t lateness_ns) noexcept;

    const Options options_;
    const std::int64_t epoch_ns_;

    // Only the thread that reads uses these.
    std::vector<double> row_;
    std::vector<std::pair<std::size_t, double>> identities_;  // channel, last value
    std::optional<Cadence> cadence_;
    Throttle throttle_;
    std::int64_t due_ns_ = 0, earliest_ns_ = 0, latest_ns_ = 0, took_ns_ = 0;
    bool started_ = false;
    bool throttled_ = false;  // the budget delays the next read

    // Written before `state_` leaves kOpening (release), read after that (acquire).
    std::unique_ptr<Sensor> sensor_;
    std::unique_ptr<Ring> ring_, coarse_ring_;
    std::unique_ptr<Coarsener> coarsener_;
    std::exception_ptr error_;

    std::atomic<std::uint32_t> state_{static_cast<std::uint32_t>(State::kOpening)};
    // One writer, the thread that reads. Others want recent values in no special order: relaxed.
    std::atomic<std::uint64_t> samples_{0}, late_{0}, skipped_{0}, failed_reads_{0};
    std::atomic<std::uint64_t> settled_{0}, wasted_{0};
    std::atomic<std::int64_t> cpu_ns_{0}, refresh_ns_{0}, min_spacing_ns_{0}, spacing_ns_;
};

}  // namespace pepr
