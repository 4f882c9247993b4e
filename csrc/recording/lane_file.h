#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "recording/arrow.h"
#include "recording/thin.h"
#include "sampling/ring.h"

namespace pepr {

// One lane on disk, `STEM.arrows`. What was read lately lies in small batches in
// `STEM.tail.arrows` and is now and then rewritten as one large batch, thinned; a crash between the
// two leaves rows in both. What the disk does not take is kept for later. Any thread may call any
// of the functions.
class LaneFile {
public:
    struct How {
        std::string stem, schema;     // columns: t_ns, read_ns, skipped, gap_ns, and the channels
        std::vector<ThinRule> rules;  // a channel each
    };

    // Throws std::system_error.
    explicit LaneFile(How how);

    std::size_t width() const noexcept { return how_.rules.size(); }

    // Rows to be written at the next flush.
    void append(const RingView::Columns& columns, std::size_t rows);

    // Appends what the ring got since the last drain, and writes it unless the disk is full.
    void drain(const RingView& ring);

    // Writes what was appended. `last`: as a large batch, and the files end there. If the disk is
    // full then, fewer rows are written; the last one is among them, so that counters lose no
    // energy.
    void flush(bool last = false);

    // These never wait, not for a disk that hangs either.
    int error() const noexcept { return error_; }  // of the last write, errno; 0: none
    std::uint64_t dropped_rows() const noexcept { return dropped_; }  // for good: no disk took them
    std::uint64_t lost_rows() const noexcept { return lost_; }  // overwritten before we took them

private:
    void make_room(std::size_t rows);
    void keep(const RingView::Columns& columns, std::size_t rows);
    void write();
    void consolidate();
    void learn(const std::vector<double>& columns);
    std::string batch_of(const std::vector<std::size_t>& rows, bool thinned) const;
    void forget() noexcept;
    void end();
    void squeeze();
    void give_up();
    bool attempt(int error) noexcept;
    void transpose(std::size_t first, std::vector<double>& columns) const;

    How how_;
    std::mutex mutex_;  // of all that follows
    ArrowFile main_, tail_;
    // Rows since the last large batch, of which the tail holds `in_tail_`; values row by row.
    std::vector<std::int64_t> t_ns_;
    std::vector<std::uint32_t> read_ns_, since_read_ns_;
    std::vector<double> values_;
    std::size_t in_tail_ = 0, whole_;
    std::optional<std::int64_t> last_ns_;
    // As long each time, so they keep their memory.
    std::string messages_;
    std::vector<double> columns_;
    std::vector<std::int64_t> ring_t_ns_, ring_read_ns_;
    std::uint64_t cursor_ = 0;

    std::atomic<std::uint64_t> lost_{0}, dropped_{0};
    std::atomic<int> error_{0};
};

}  // namespace pepr
