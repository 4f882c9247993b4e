// Prints the spacing that the product's SteadySpacing asks for after each step of a counter.
//
//   steady_spacing BASE_NS < "STEP SINCE_NS" lines

#include <cstdint>
#include <cstdlib>
#include <iostream>

#include "sampling/steady.h"

int main(int, char** argv) {
    pepr::SteadySpacing spacing(std::atoll(argv[1]));
    double step = 0;
    std::int64_t since_ns = 0;
    while (std::cin >> step >> since_ns) std::cout << spacing.next_ns(step, since_ns) << '\n';
}
