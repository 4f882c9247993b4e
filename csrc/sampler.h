#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "budget.h"
#include "coarse.h"
#include "ring.h"
#include "sensor.h"

namespace pepr {

// One lane: one driver, one thread, one ring. The thread opens the sensor too, so that a driver
// that takes seconds to wake (NVML without persistence mode) or hangs delays nobody else.
class Sampler {
public:
    enum class State : std::uint32_t { kOpening, kRunning, kStopped, kFailed };

    struct Stats {
        std::uint64_t samples;       // rows written to the ring
        std::uint64_t late;          // rows begun more than half a period after their deadline
        std::uint64_t skipped;       // deadlines passed over because a read outlasted the period
        std::uint64_t failed_reads;  // numbers that were unknown
        std::uint64_t lost;          // rows overwritten before this reader took them
        std::int64_t cpu_ns;         // CPU time of the thread
        std::uint64_t settled;       // rows read since the cadence is known
        std::uint64_t wasted;        // of these: no number that is watched had changed
        std::int64_t refresh_ns;     // the shortest refresh period that was learnt, 0: none
        std::int64_t gap_ns;         // what the budget puts between two reads now, 0: nothing
    };

    // `learn`: read when the numbers are refreshed, at period_ns only until that is known; else
    // every period_ns, whatever they do. The budget stretches either. `coarse`: what is read is
    // also told coarsely, in a second ring. `relinquish`: the thread gives up every capability that
    // it was started with as soon as the sensor is open.
    Sampler(std::string spec, std::int64_t period_ns, bool learn = false,
            std::shared_ptr<Budget> budget = nullptr, std::optional<Coarse> coarse = {},
            bool relinquish = false);
    ~Sampler();
    Sampler(const Sampler&) = delete;
    Sampler& operator=(const Sampler&) = delete;

    // Waits until the sensor is open and has been read once. False: still opening at the deadline.
    // Throws what the sensor threw.
    bool wait_ready(std::int64_t timeout_ns) const;

    // Takes one last sample and ends the thread. False: the driver did not return in time; the
    // thread is left behind, since a thread inside a hung driver cannot be ended.
    bool stop(std::int64_t timeout_ns);

    State state() const noexcept;
    const std::vector<Channel>& channels() const;
    const std::vector<Note>& notes() const;
    std::size_t read(const Ring::Columns& out);
    std::size_t width() const;
    std::uint64_t waiting() const;  // rows that read() has not given yet
    int share(bool coarse) const;   // a reader's descriptor of the ring, or of the coarse one
    Stats stats() const noexcept;

private:
    struct Shared;
    const Shared& opened() const;

    std::shared_ptr<Shared> shared_;  // outlives us when the thread is left behind
    std::optional<std::thread> thread_;
    int owner_pid_;
    std::uint64_t cursor_ = 0;
    std::uint64_t lost_ = 0;
};

}  // namespace pepr
