#include "recording/thin.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

namespace pepr {

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
// Times the usual interval between changes: a power jump may hide in one longer than this.
constexpr double kLongInterval = 1.5;
// Likewise: without a change for longer than this, the counter stood still.
constexpr double kStandstill = 8;

// A column, and what is known of it since the row kept last.
struct ThinColumn {
    ThinRule rule;
    const double* values;
    double interval_s = 0.0;             // the usual one between two changes
    double changed_s = 0.0, rate = 0.0;  // when it changed last, and its rate of change then

    double t_s = 0.0, first = 0.0;                // time and value of the row kept last
    double least = -kInfinity, most = kInfinity;  // slopes of the lines that fit all rows since
    double integral = 0.0, largest = 0.0;         // of the values since
    bool moved = false;                           // it has changed since
    bool fresh = true;                            // it has just changed, or not at all since
    bool fits = true;                             // a line to this row fits all rows between

    void begin(std::size_t row, double at_s) {
        t_s = at_s;
        first = values[row];
        least = -kInfinity;
        most = kInfinity;
        integral = largest = 0.0;
        moved = false;
        fresh = fits = true;
    }

    // Takes in the next row. False if a row must be kept before it.
    bool accepts(std::size_t row, double at_s, double before_s) {
        const double value = values[row];
        if (std::isnan(value)) return true;
        const double since_s = at_s - t_s;
        switch (rule.kind) {
            case ThinRule::Kind::kLine: {
                const bool changes = value != values[row - 1];
                fresh = changes || !moved;
                fits = true;
                if (!changes) return true;
                moved = true;
                const double slope = (value - first) / since_s;
                fits = slope >= least && slope <= most;
                const double off = rule.tolerance * slope * interval_s;
                narrow(slope, off / since_s);
                return least <= most;
            }
            case ThinRule::Kind::kHold: {
                const double allowed = rule.tolerance * std::abs(first);
                const bool within = std::abs(value - first) <= allowed;
                integral += (value - first) * (at_s - before_s);
                return within && std::abs(integral) <= 20 * allowed * interval_s;
            }
            case ThinRule::Kind::kLevel: {
                integral += value * (at_s - before_s);
                largest = std::max({largest, std::abs(value), std::abs(first)});
                narrow(integral / since_s, rule.tolerance * largest / since_s);
                return least <= most;
            }
        }
        return false;
    }

    bool may_keep() const { return fresh && fits; }

    // Whether this row and the one before it have to be kept, whatever the other columns say.
    bool breaks(std::size_t row, double at_s) {
        const double value = values[row], before = values[row - 1];
        if (std::isnan(value) != std::isnan(before)) return true;
        if (rule.kind != ThinRule::Kind::kLine || value == before || std::isnan(value))
            return false;
        const double since_change_s = at_s - changed_s, expected = rate * since_change_s;
        const bool jumps = since_change_s > kLongInterval * interval_s &&
                           std::abs(value - before - expected) > rule.tolerance * rate * interval_s;
        changed_s = at_s;
        rate = (value - before) / since_change_s;
        return jumps || value < before || since_change_s > kStandstill * interval_s;
    }

private:
    void narrow(double slope, double by) {
        least = std::max(least, slope - std::abs(by));
        most = std::min(most, slope + std::abs(by));
    }
};

double mean_interval_s(const double* values, const std::int64_t* t_ns, std::size_t n) {
    std::int64_t sum_ns = 0, count = 0, last_ns = -1;
    for (std::size_t i = 1; i < n; ++i) {
        if (values[i] == values[i - 1] || std::isnan(values[i])) continue;
        if (last_ns >= 0 && t_ns[i] - last_ns < kThinGapNs) {
            sum_ns += t_ns[i] - last_ns;
            ++count;
        }
        last_ns = t_ns[i];
    }
    if (count > 0) return 1e-9 * static_cast<double>(sum_ns) / static_cast<double>(count);
    return n > 1 ? 1e-9 * static_cast<double>(t_ns[n - 1] - t_ns[0]) / static_cast<double>(n - 1)
                 : 0.0;
}

std::pair<std::size_t, std::size_t> extremes(const double* values, std::size_t n) {
    std::size_t lowest = 0, highest = 0;
    for (std::size_t i = 1; i < n; ++i) {
        if (!(values[i] >= values[lowest]) && !std::isnan(values[i])) lowest = i;
        if (!(values[i] <= values[highest]) && !std::isnan(values[i])) highest = i;
    }
    return {lowest, highest};
}

}  // namespace

double first_interval_s(const double* values, const std::int64_t* t_ns, std::size_t n) {
    std::vector<std::int64_t> between_ns;
    std::int64_t last_ns = -1;
    for (std::size_t i = 1; i < n && between_ns.size() + 1 < kRefreshChanges; ++i) {
        if (values[i] == values[i - 1] || std::isnan(values[i])) continue;
        if (last_ns >= 0) between_ns.push_back(t_ns[i] - last_ns);
        last_ns = t_ns[i];
    }
    if (between_ns.size() + 1 < kFewestRefreshChanges) return 0.0;
    const auto middle = between_ns.begin() + static_cast<std::ptrdiff_t>(between_ns.size() / 2);
    std::nth_element(between_ns.begin(), middle, between_ns.end());
    return 1e-9 * static_cast<double>(*middle);
}

std::vector<std::size_t> thin(const std::vector<ThinRule>& rules, const std::int64_t* t_ns,
                              const double* values, std::size_t stride, std::size_t n,
                              std::size_t unthinned) {
    std::vector<std::size_t> kept;
    if (n == 0) return kept;
    std::vector<ThinColumn> columns;
    for (std::size_t c = 0; c < rules.size(); ++c) {
        ThinColumn column{};
        column.rule = rules[c];
        column.values = values + c * stride;
        column.interval_s = mean_interval_s(column.values, t_ns, n);
        if (column.rule.max_interval_s > 0)
            column.interval_s = std::min(column.interval_s, column.rule.max_interval_s);
        columns.push_back(column);
    }
    const auto at_s = [&](std::size_t row) {
        return 1e-9 * static_cast<double>(t_ns[row] - t_ns[0]);
    };

    std::vector<bool> required(n, false);
    required[0] = required[n - 1] = true;
    std::fill_n(required.begin(), std::min(unthinned, n), true);
    for (std::size_t i = 1; i < n; ++i) {
        if (t_ns[i] - t_ns[i - 1] > kThinGapNs) required[i - 1] = required[i] = true;
        for (ThinColumn& column : columns)
            if (column.breaks(i, at_s(i))) required[i - 1] = required[i] = true;
    }
    for (const ThinColumn& column : columns) {
        if (column.rule.kind == ThinRule::Kind::kLine) continue;
        const auto [lowest, highest] = extremes(column.values, n);
        required[lowest] = required[highest] = true;
    }

    const auto keep = [&](std::size_t row) {
        kept.push_back(row);
        for (ThinColumn& column : columns) column.begin(row, at_s(row));
    };
    keep(0);
    std::size_t candidate = 0;  // the last row that could follow the one kept last
    for (std::size_t i = 1; i < n; ++i) {
        bool goes_on = t_ns[i] - t_ns[kept.back()] <= kThinLongestNs, may_keep = true;
        for (ThinColumn& column : columns) {
            goes_on &= column.accepts(i, at_s(i), at_s(i - 1));
            may_keep &= column.may_keep();
        }
        if (goes_on && may_keep) candidate = i;
        const bool lost = !goes_on || (required[i] && candidate != i);
        if (lost && kept.back() + 1 < i) {
            // Back to the last row that would do; without one, to the row after the last kept one.
            i = candidate > kept.back() ? candidate : kept.back() + 1;
            keep(i);
        } else if (lost || required[i]) {
            keep(i);
        }
    }
    return kept;
}

}  // namespace pepr
