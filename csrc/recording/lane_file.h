// One lane on disk: the two files that hold its rows.
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

// The main file is `STEM.arrows`. New rows go to `STEM.tail.arrows` in small batches; now and then
// they are thinned and move to the main file as one large batch. A crash in between leaves rows in
// both. Rows that could not be written stay in memory for later. All functions are thread-safe.
class LaneFile {
public:
    struct Options {
        std::string stem, schema;     // columns: t_ns, read_ns, skipped, gap_ns, and the channels
        std::vector<ThinRule> rules;  // one for each channel
    };

    // Throws std::system_error.
    explicit LaneFile(Options options);

    std::size_t width() const noexcept { return options_.rules.size(); }

    // Adds rows, which the next flush writes.
    void append(const RingView::Columns& columns, std::size_t rows);

    // Appends the ring's rows since the last drain, and writes them unless the disk is full.
    void drain(const RingView& ring);

    // Writes what was appended. `last`: as a large batch, and closes the files. If the disk is full
    // then, it writes fewer rows; the last row is among them, so that counters lose no energy.
    void flush(bool last = false);

    // Goes on in files of another stem, which get what these have, as far as it can be read: theirs
    // were removed. Returns errno if it cannot write there, else 0.
    int move_to(const std::string& stem);

    // These never wait, not even while the disk hangs.
    int error() const noexcept { return error_; }  // errno of the last write; 0: none
    std::uint64_t dropped_rows() const noexcept { return dropped_; }  // never written
    std::uint64_t lost_rows() const noexcept { return lost_; }        // overwritten in the ring

private:
    void make_room(std::size_t rows);
    void add(const RingView::Columns& columns, std::size_t rows);
    void write();
    void consolidate();
    void learn_intervals(const std::vector<double>& columns);
    std::string batch_of(const std::vector<std::size_t>& rows, bool thinned) const;
    void clear_rows() noexcept;
    void end();
    void write_fewer_rows();
    void drop_unwritten();
    bool succeeded(int error) noexcept;
    void transpose(std::size_t first, std::vector<double>& columns) const;

    Options options_;
    std::mutex mutex_;  // protects all that follows, except the atomics
    ArrowFile main_, tail_;
    // The rows since the last large batch, values row by row. The first `in_tail_` are in the tail.
    std::vector<std::int64_t> t_ns_;
    std::vector<std::uint32_t> read_ns_, since_read_ns_;
    std::vector<double> values_;
    std::size_t in_tail_ = 0;
    std::size_t unthinned_;  // rows left of those at the beginning that are not thinned
    std::optional<std::int64_t> last_ns_;
    // Buffers, kept because they have the same size each time.
    std::string messages_;
    std::vector<double> columns_;
    std::vector<std::int64_t> ring_t_ns_, ring_read_ns_;
    std::uint64_t cursor_ = 0;

    std::atomic<std::uint64_t> lost_{0}, dropped_{0};
    std::atomic<int> error_{0};
};

}  // namespace pepr
