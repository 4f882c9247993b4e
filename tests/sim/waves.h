#pragma once

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstddef>
#include <ctime>
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

// Power over time, with its exact integral. The kinds and their numbers are those of waves.py,
// which finds the integral in another way.
class Wave {
public:
    Wave() = default;

    explicit Wave(Line& line) : kind_(line.word()), p_() {
        while (!line.done()) p_.push_back(line.number());
        const bool fits = kind_ == "constant" ? p_.size() == 1
                          : kind_ == "step"   ? p_.size() == 3
                          : kind_ == "square" ? p_.size() == 5
                          : kind_ == "sine"   ? p_.size() == 4
                          : kind_ == "points" ? p_.size() >= 2 && p_.size() % 2 == 0
                                              : false;
        if (!fits) throw std::runtime_error("no such wave: " + kind_);
    }

    // Over a window that is not empty.
    double mean_w(double from_s, double to_s) const {
        return (integral_j(to_s) - integral_j(from_s)) / (to_s - from_s);
    }

    double value(double t_s) const {
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
};

}  // namespace pepr::sim
