#pragma once

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstddef>
#include <ctime>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace pepr::sim {

inline long long monotonic_ns() noexcept {
    timespec now{};
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1'000'000'000LL + now.tv_nsec;
}

// Not strtod: that one follows the process's locale.
template <class Number>
Number parse(const std::string& text) {
    Number value{};
    const auto* end = text.data() + text.size();
    const auto [stop, error] = std::from_chars(text.data(), end, value);
    if (error != std::errc{} || stop != end) throw std::runtime_error("not a number: " + text);
    return value;
}

// One directive of a scenario: words split by blanks, taken from the left. `#` ends the line.
class Line {
public:
    explicit Line(const std::string& text) : text_(text.substr(0, text.find('#'))) { skip(); }

    bool done() const { return at_ == text_.size(); }

    std::string word() {
        if (done()) throw std::runtime_error("a word is missing");
        const auto end = std::min(text_.find_first_of(kBlanks, at_), text_.size());
        auto found = text_.substr(at_, end - at_);
        at_ = end;
        skip();
        return found;
    }

    template <class Number = double>
    Number number() {
        return parse<Number>(word());
    }

    // A whole number, or -1 for `*`, any.
    int choice() {
        const auto text = word();
        return text == "*" ? -1 : parse<int>(text);
    }

    std::string rest() {
        const auto end = text_.find_last_not_of(kBlanks) + 1;
        auto found = text_.substr(at_, end - std::min(at_, end));
        at_ = text_.size();
        return found;
    }

private:
    static constexpr auto kBlanks = " \t\r";

    void skip() { at_ = std::min(text_.find_first_not_of(kBlanks, at_), text_.size()); }

    std::string text_;
    std::size_t at_ = 0;
};

// Steps that another program appends to a file while they happen: pairs of doubles, seconds since
// the epoch and the power from then on. The first one's power was there before it.
class Followed {
public:
    explicit Followed(const std::string& path) : fd_(open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
        if (fd_ < 0) throw std::runtime_error("cannot be followed: " + path);
    }
    Followed(const Followed&) = delete;
    Followed& operator=(const Followed&) = delete;
    ~Followed() { close(fd_); }

    double value(double t_s) { return at(t_s).power_w; }

    double integral_j(double t_s) {
        const auto step = at(t_s), origin = at(0.0);
        return step.before_j + step.power_w * (t_s - step.t_s) -
               (origin.before_j + origin.power_w * (0.0 - origin.t_s));
    }

private:
    struct Step {
        double t_s = 0, power_w = 0, before_j = 0;  // since the first step
    };

    Step at(double t_s) {
        const std::lock_guard lock(mutex_);
        double pair[2];
        while (pread(fd_, pair, sizeof pair, static_cast<off_t>(steps_.size() * sizeof pair)) ==
               static_cast<ssize_t>(sizeof pair)) {
            Step step{pair[0], pair[1], 0.0};
            if (!steps_.empty()) {
                const auto& last = steps_.back();
                step.before_j = last.before_j + last.power_w * (step.t_s - last.t_s);
            }
            steps_.push_back(step);
        }
        if (steps_.empty()) return {};
        const auto after = std::upper_bound(steps_.begin(), steps_.end(), t_s,
                                            [](double t, const Step& s) { return t < s.t_s; });
        return after == steps_.begin() ? *after : *(after - 1);
    }

    int fd_;
    std::mutex mutex_;
    std::vector<Step> steps_;
};

// Power over time, with its exact integral. The kinds and their numbers are those of waves.py,
// which finds the integral in another way.
class Wave {
public:
    Wave() = default;

    explicit Wave(Line& line) : kind_(line.word()), p_() {
        if (kind_ == "follow") {
            followed_ = std::make_shared<Followed>(line.rest());
            return;
        }
        while (!line.done()) p_.push_back(line.number());
        const bool fits = kind_ == "constant" ? p_.size() == 1
                          : kind_ == "step"   ? p_.size() == 3
                          : kind_ == "square" ? p_.size() == 5
                          : kind_ == "sine"   ? p_.size() == 4
                          : kind_ == "points" ? p_.size() >= 2 && p_.size() % 2 == 0
                                              : false;
        if (!fits) throw std::runtime_error("no such wave: " + kind_);
    }

    // Behind a low pass of time constant tau_s.
    double smoothed_w(double t_s, double tau_s) const {
        constexpr int kSlices = 200;
        constexpr double kTaus = 10;  // further back nothing is left
        double sum_w = 0, weights = 0;
        for (int i = 0; i < kSlices; ++i) {
            const double from = kTaus * i / kSlices, to = kTaus * (i + 1) / kSlices;
            const double weight = std::exp(-from) - std::exp(-to);
            sum_w += weight * mean_w(t_s - to * tau_s, t_s - from * tau_s);
            weights += weight;
        }
        return sum_w / weights;
    }

    // Over a window that is not empty.
    double mean_w(double from_s, double to_s) const {
        return (integral_j(to_s) - integral_j(from_s)) / (to_s - from_s);
    }

    double value(double t_s) const {
        if (followed_) return followed_->value(t_s);
        if (kind_ == "constant") return p_[0];
        if (kind_ == "step") return t_s < p_[0] ? p_[1] : p_[2];
        if (kind_ == "square") {
            const double cycles = (t_s - p_[4]) / p_[0];
            return cycles - std::floor(cycles) < p_[3] ? p_[2] : p_[1];
        }
        if (kind_ == "sine") return p_[0] + p_[1] * std::sin(kTau / p_[2] * (t_s - p_[3]));
        if (t_s <= p_[0]) return p_[1];
        std::size_t i = 2;
        while (i < p_.size() && t_s >= p_[i]) i += 2;
        if (i == p_.size()) return p_.back();
        return p_[i - 1] + (p_[i + 1] - p_[i - 1]) * (t_s - p_[i - 2]) / (p_[i] - p_[i - 2]);
    }

    // The energy from the epoch to t_s; negative before the epoch.
    double integral_j(double t_s) const {
        if (followed_) return followed_->integral_j(t_s);
        if (kind_ == "constant") return p_[0] * t_s;
        if (kind_ == "step") {
            const auto after = [&](double t) {
                return t > p_[0] ? (p_[2] - p_[1]) * (t - p_[0]) : 0.0;
            };
            return p_[1] * t_s + after(t_s) - after(0.0);
        }
        if (kind_ == "square") {
            const auto high_s = [&](double t) {
                const double cycles = std::floor(t / p_[0]);
                return p_[0] * (cycles * p_[3] + std::min(t / p_[0] - cycles, p_[3]));
            };
            return p_[1] * t_s + (p_[2] - p_[1]) * (high_s(t_s - p_[4]) - high_s(-p_[4]));
        }
        if (kind_ == "sine") {
            const double w = kTau / p_[2];
            return p_[0] * t_s + p_[1] / w * (std::cos(-w * p_[3]) - std::cos(w * (t_s - p_[3])));
        }
        return points_j(t_s) - points_j(0.0);
    }

private:
    static constexpr double kTau = 6.283185307179586;

    // From the first point; constant power outside.
    double points_j(double t_s) const {
        if (t_s <= p_[0]) return p_[1] * (t_s - p_[0]);
        double sum_j = 0;
        for (std::size_t i = 0; i + 3 < p_.size(); i += 2) {
            const double span_s = p_[i + 2] - p_[i];
            const double part_s = std::min(t_s - p_[i], span_s);
            sum_j += part_s * (p_[i + 1] + 0.5 * (p_[i + 3] - p_[i + 1]) * part_s / span_s);
            if (t_s < p_[i + 2]) return sum_j;
        }
        return sum_j + p_[p_.size() - 1] * (t_s - p_[p_.size() - 2]);
    }

    std::string kind_ = "constant";
    std::vector<double> p_{0.0};
    std::shared_ptr<Followed> followed_;
};

}  // namespace pepr::sim
