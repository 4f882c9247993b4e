// Numbers in text, whatever locale the program has set.
#pragma once

#include <charconv>
#include <cstdlib>
#include <system_error>

#include <locale.h>

namespace pepr {

// The C locale: a decimal point, and messages in ASCII.
inline locale_t plain_locale() noexcept {
    static const locale_t kPlain = ::newlocale(LC_ALL_MASK, "C", nullptr);
    return kPlain;
}

// As strtod, but with a decimal point whatever locale the program has set: in a comma locale
// strtod reads a perf scale of "2.3e-10" as 2. std::from_chars for doubles needs GCC 11.
inline double to_double(const char* text, char** end = nullptr) noexcept {
    return ::strtod_l(text, end, plain_locale());
}

// While it lives, this thread writes numbers and messages as in the C locale. Without it, strerror
// of a program in fr_FR.ISO-8859-1 gives bytes that are no UTF-8.
class PlainLocale {
public:
    PlainLocale() noexcept : before_(::uselocale(plain_locale())) {}
    ~PlainLocale() { ::uselocale(before_); }
    PlainLocale(const PlainLocale&) = delete;
    PlainLocale& operator=(const PlainLocale&) = delete;

private:
    locale_t before_;
};

// Parses an unsigned decimal number and moves `at` past it. False if there is none.
template <typename T>
bool parse_number(const char*& at, const char* end, T& value) noexcept {
    while (at < end && *at == ' ') ++at;
    const auto [next, error] = std::from_chars(at, end, value);
    if (error != std::errc{}) return false;
    at = next;
    return true;
}

}  // namespace pepr
