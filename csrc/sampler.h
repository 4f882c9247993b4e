#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

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
    };

    Sampler(std::string spec, std::int64_t period_ns);
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
