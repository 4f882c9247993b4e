#include "recording/lane_file.h"

#include <algorithm>
#include <cerrno>
#include <utility>

namespace pepr {

namespace {

// Rows of a large batch: so many that its 400 bytes of header do not matter.
constexpr std::size_t kBatchRows = 1024;

// Rows that are read from a ring and written at a time. We keep the memory for them.
constexpr std::size_t kDrainRows = 256;

// The size of the tail at which its rows move to the main file. A flush costs 50 bytes for each
// channel besides its numbers, and the processes of 64 GPUs take 3,000 channels.
constexpr std::size_t kTailBytes = 1 << 24;

// Rows at the beginning of a lane that are not thinned: refresh periods are learnt from them.
constexpr std::size_t kUnthinnedRows = 256;

// Rows that wait in memory while the disk is full, before they are dropped: 2 min at 1 kHz.
constexpr std::size_t kMostPendingRows = 1 << 17;

using Lock = std::lock_guard<std::mutex>;

template <typename T>
void make_room(std::vector<T>& column, std::size_t more) {
    const std::size_t size = column.size() + more;
    if (size > column.capacity()) column.reserve(std::max(size, 2 * column.capacity()));
}

template <typename T>
std::vector<T> pick(const std::vector<T>& column, const std::vector<std::size_t>& rows) {
    std::vector<T> picked;
    picked.reserve(rows.size());
    for (const std::size_t row : rows) picked.push_back(column[row]);
    return picked;
}

}  // namespace

LaneFile::LaneFile(Options options)
    : options_(std::move(options)),
      main_(options_.stem + ".arrows", options_.schema),
      tail_(options_.stem + ".tail.arrows", options_.schema),
      unthinned_(kUnthinnedRows) {}

void LaneFile::append(const RingView::Columns& columns, std::size_t rows) {
    const Lock lock(mutex_);
    make_room(rows);
    add(columns, rows);
}

void LaneFile::drain(const RingView& ring) {
    const Lock lock(mutex_);
    while (ring.head() != cursor_) {
        const auto rows = std::min<std::size_t>(ring.head() - cursor_, kDrainRows);
        ring_t_ns_.resize(rows);
        ring_read_ns_.resize(rows);
        columns_.resize(rows * width());
        make_room(rows);
        const RingView::Columns out{ring_t_ns_.data(), ring_read_ns_.data(), columns_.data(), rows};
        std::uint64_t lost = 0;
        add(out, ring.read(cursor_, out, lost));
        lost_ += lost;
        if (error_ == 0) write();
    }
}

// Reserves memory first: if it throws, the ring still has the rows, and all columns the same
// length.
void LaneFile::make_room(std::size_t rows) {
    pepr::make_room(t_ns_, rows);
    pepr::make_room(read_ns_, rows);
    pepr::make_room(since_read_ns_, rows);
    pepr::make_room(values_, rows * width());
}

void LaneFile::add(const RingView::Columns& columns, std::size_t rows) {
    for (std::size_t r = 0; r < rows; ++r) {
        const std::int64_t t_ns = columns.t_ns[r];
        t_ns_.push_back(t_ns);
        read_ns_.push_back(to_short_ns(columns.read_ns[r]));
        since_read_ns_.push_back(to_short_ns(t_ns - last_ns_.value_or(t_ns)));
        for (std::size_t c = 0; c < width(); ++c)
            values_.push_back(columns.values[c * columns.stride + r]);
        last_ns_ = t_ns;
    }
}

void LaneFile::flush(bool last) {
    const Lock lock(mutex_);
    write();
    if (last) end();
}

int LaneFile::move_to(const std::string& stem) {
    const Lock lock(mutex_);
    if (const int error = main_.move_to(stem + ".arrows")) return error;
    if (const int error = tail_.move_to(stem + ".tail.arrows")) return error;
    if (tail_.size() == 0) in_tail_ = 0;  // memory still has its rows
    return 0;
}

void LaneFile::write() {
    const std::size_t n = t_ns_.size() - in_tail_;
    if (n == 0) return;
    transpose(in_tail_, columns_);
    const std::vector<std::uint32_t> skipped(n);
    std::vector<ArrowColumn> columns{{&t_ns_[in_tail_], sizeof t_ns_[0]},
                                     {&read_ns_[in_tail_], sizeof read_ns_[0]},
                                     {skipped.data(), sizeof skipped[0]},
                                     {&since_read_ns_[in_tail_], sizeof since_read_ns_[0]}};
    for (std::size_t c = 0; c < width(); ++c)
        columns.push_back({&columns_[c * n], sizeof columns_[0]});
    messages_.clear();
    append_batch(messages_, columns, n);
    if (succeeded(tail_.append(messages_))) in_tail_ = t_ns_.size();
    if (t_ns_.size() >= kBatchRows || tail_.size() >= kTailBytes) consolidate();
}

void LaneFile::end() {
    if (!t_ns_.empty()) consolidate();
    if (t_ns_.empty()) {
        succeeded(main_.finish());
        tail_.remove();  // if that fails, a reader drops the rows that it has twice
    } else {
        if (error_ == ENOSPC || error_ == EDQUOT) write_fewer_rows();
        drop_unwritten();
    }
    main_.close();
    tail_.close();
}

// The rows from `first` on, column by column.
void LaneFile::transpose(std::size_t first, std::vector<double>& columns) const {
    const std::size_t n = t_ns_.size() - first;
    columns.resize(n * width());
    for (std::size_t r = 0; r < n; ++r)
        for (std::size_t c = 0; c < width(); ++c)
            columns[c * n + r] = values_[(first + r) * width() + c];
}

void LaneFile::consolidate() {
    const std::size_t n = t_ns_.size();
    std::vector<double> columns;  // not kept: with many channels it is megabytes
    transpose(0, columns);
    learn_intervals(columns);
    const auto rows = thin(options_.rules, t_ns_.data(), columns.data(), n, n, unthinned_);
    if (succeeded(main_.append(batch_of(rows, true)))) {
        unthinned_ -= std::min(unthinned_, n);
        clear_rows();
        (void)tail_.clear();
    } else if (n > kMostPendingRows) {
        drop_unwritten();
    }
}

// A counter is read less often while power is steady. Its tolerance stays that of its first
// interval.
void LaneFile::learn_intervals(const std::vector<double>& columns) {
    const std::size_t n = t_ns_.size();
    for (std::size_t c = 0; c < width(); ++c)
        if (ThinRule& rule = options_.rules[c];
            rule.kind == ThinRule::Kind::kLine && rule.max_interval_s == 0.0)
            rule.max_interval_s = first_interval_s(&columns[c * n], t_ns_.data(), n);
}

// `thinned`: the rows in between follow from these rows; if not, they are lost.
std::string LaneFile::batch_of(const std::vector<std::size_t>& rows, bool thinned) const {
    std::vector<std::uint32_t> skipped(rows.size());
    for (std::size_t i = 1; thinned && i < rows.size(); ++i)
        skipped[i] = static_cast<std::uint32_t>(rows[i] - rows[i - 1] - 1);
    const auto t_ns = pick(t_ns_, rows);
    const auto read_ns = pick(read_ns_, rows), since_read_ns = pick(since_read_ns_, rows);
    std::vector<double> kept(rows.size() * width());
    std::vector<ArrowColumn> columns{{t_ns.data(), sizeof t_ns[0]},
                                     {read_ns.data(), sizeof read_ns[0]},
                                     {skipped.data(), sizeof skipped[0]},
                                     {since_read_ns.data(), sizeof since_read_ns[0]}};
    for (std::size_t c = 0; c < width(); ++c) {
        double* const column = kept.data() + c * rows.size();
        for (std::size_t i = 0; i < rows.size(); ++i) column[i] = values_[rows[i] * width() + c];
        columns.push_back({column, sizeof *column});
    }
    std::string batch;
    append_batch(batch, columns, rows.size());
    return batch;
}

void LaneFile::clear_rows() noexcept {
    t_ns_.clear();
    read_ns_.clear();
    since_read_ns_.clear();
    values_.clear();
    in_tail_ = 0;
}

// Writes some of the rows, evenly chosen and with the last, over those in the tail: nobody else can
// take that space. Without a tail it takes free space. It uses half of either, so that other lanes
// without space find some.
void LaneFile::write_fewer_rows() {
    const std::size_t n = t_ns_.size(), row_bytes = 20 + 8 * width();
    const bool over_tail = in_tail_ > 0;
    std::size_t count =
        std::min(n, (over_tail ? tail_.size() : main_.free_bytes()) / 2 / row_bytes);
    for (; count > 0 && !t_ns_.empty(); count /= 2) {
        std::vector<std::size_t> rows{n - 1};
        for (std::size_t left = count - 1; left > 0; --left)
            rows.push_back((left - 1) * (n - 1) / (count - 1));
        std::reverse(rows.begin(), rows.end());
        const std::string batch = batch_of(rows, false);
        if (!succeeded(over_tail ? tail_.replace(batch) : main_.append(batch))) continue;
        dropped_ += n - count;
        clear_rows();
    }
}

// Drops the rows that are in no file.
void LaneFile::drop_unwritten() {
    dropped_ += t_ns_.size() - in_tail_;
    t_ns_.resize(in_tail_);
    read_ns_.resize(in_tail_);
    since_read_ns_.resize(in_tail_);
    values_.resize(in_tail_ * width());
}

bool LaneFile::succeeded(int error) noexcept {
    error_ = error;
    return error == 0;
}

}  // namespace pepr
