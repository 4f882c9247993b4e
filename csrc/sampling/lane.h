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

// The CPU time of the calling thread, lap by lap; the first begins with the thread.
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

// One driver and its ring: how it is read, when, and what that costs. A lane has no thread; whoever
// reads it (readers.h) is the only one who does.
class Lane {
public:
    enum class State : std::uint32_t { kOpening, kRunning, kStopped, kFailed };

    struct Stats {
        std::uint64_t samples;        // rows written to the ring
        std::uint64_t late;           // rows begun more than half a period after their deadline
        std::uint64_t skipped;        // deadlines passed over because a read outlasted the period
        std::uint64_t failed_reads;   // numbers that were unknown
        std::uint64_t lost;           // rows overwritten before this reader took them
        std::int64_t cpu_ns;          // CPU time of reading it, with its wake-ups
        std::uint64_t settled;        // rows read since the cadence is known
        std::uint64_t wasted;         // of these: no number that is watched had changed
        std::int64_t refresh_ns;      // the shortest refresh period that was learnt, 0: none
        std::int64_t min_spacing_ns;  // what the budget puts between two reads now, 0: nothing
    };

    struct How {
        std::string spec;
        // When `learn`: read when the numbers are refreshed, at period_ns only until that is known;
        // else every period_ns, whatever they do. The budget stretches either.
        std::int64_t period_ns;
        bool learn = false;
        std::shared_ptr<CpuBudget> budget = nullptr;
        // What is read is also told coarsely, in a second ring.
        std::optional<Coarse> coarse = std::nullopt;
        // The opening thread gives up every capability that it has as soon as the sensor is open.
        bool drop_capabilities = false;
        // Raised when one of its numbers is another one whose quantity is "identity".
        std::shared_ptr<Notifier> notifier = nullptr;
        std::unique_ptr<Sensor> (*open)(const std::string& spec) = open_sensor;
    };

    // Periods that were asked for begin at `epoch_ns` and its multiples: lanes meet.
    Lane(How how, std::int64_t epoch_ns);

    // --- for whoever reads it ---

    // Opens the sensor, which may take seconds. False: it failed; `state` and `error` say so.
    bool open() noexcept;
    // Takes a sample and plans the next one. `last`: there is none, and what was put off is due.
    void read(bool last, CpuLaps& laps) noexcept;
    // The CPU time since the last lap was this lane's.
    void charge(CpuLaps& laps) noexcept;
    // When it is to be read next. A lane whose period nobody asked for, and whose refreshes nobody
    // waits for, may be read somewhat earlier or later, if that spares a wake-up.
    std::int64_t due_ns() const noexcept { return due_ns_; }
    std::int64_t earliest_ns() const noexcept { return earliest_ns_; }
    std::int64_t latest_ns() const noexcept { return latest_ns_; }
    bool is_elastic() const noexcept { return earliest_ns_ < latest_ns_; }
    std::int64_t took_ns() const noexcept { return took_ns_; }

    // --- for anyone ---

    State state() const noexcept {
        return static_cast<State>(state_.load(std::memory_order_acquire));
    }
    // Waits while it is in that state. False: it still is at the deadline.
    bool wait_while_in(State state, std::int64_t deadline_ns) const noexcept;
    // What lies between two reads, as planned last.
    std::int64_t spacing_ns() const noexcept { return spacing_ns_.load(std::memory_order_relaxed); }
    Stats stats(std::uint64_t lost) const noexcept;
    // Throws what the sensor threw, and SensorError while it is opening.
    void require_open() const;

    // --- once it is open ---

    const Sensor& sensor() const noexcept { return *sensor_; }
    const Ring& ring() const noexcept { return *ring_; }
    const Ring* coarse_ring() const noexcept { return coarse_ring_.get(); }

private:
    void enter(State next) noexcept;
    std::unique_ptr<Ring> make_ring(std::int64_t min_spacing_ns) const;
    bool knows_others() noexcept;
    bool can_wait() const noexcept;
    void plan(std::int64_t begin_ns, std::int64_t end_ns) noexcept;
    std::int64_t next_on_grid(std::int64_t begin_ns, std::int64_t end_ns) noexcept;
    std::int64_t follow(std::int64_t begin_ns, std::int64_t end_ns) noexcept;
    void meter(std::int64_t t_ns, CpuLaps& laps) noexcept;
    void count(std::int64_t lateness_ns) noexcept;

    const How how_;
    const std::int64_t epoch_ns_;

    // The reader's alone.
    std::vector<double> row_;
    std::vector<std::pair<std::size_t, double>> identities_;  // where they are, and were last
    std::optional<Cadence> cadence_;
    Throttle throttle_;
    std::int64_t due_ns_ = 0, earliest_ns_ = 0, latest_ns_ = 0, took_ns_ = 0;
    bool begun_ = false, throttled_ = false;  // throttled: the budget put off what is due

    // Written by the reader before `state_` leaves kOpening (release), read after (acquire).
    std::unique_ptr<Sensor> sensor_;
    std::unique_ptr<Ring> ring_, coarse_ring_;
    std::unique_ptr<Coarsener> coarsener_;
    std::exception_ptr error_;

    std::atomic<std::uint32_t> state_{static_cast<std::uint32_t>(State::kOpening)};
    // Counters with one writer, the reader; others want recent values, not an order: relaxed.
    std::atomic<std::uint64_t> samples_{0}, late_{0}, skipped_{0}, failed_reads_{0};
    std::atomic<std::uint64_t> settled_{0}, wasted_{0};
    std::atomic<std::int64_t> cpu_ns_{0}, refresh_ns_{0}, min_spacing_ns_{0}, spacing_ns_;
};

}  // namespace pepr
