// Runs the core's own tests, without Python: what the sanitizers run (make sanitize).
//
//   core_test [FILE | PART OF A NAME]

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <new>
#include <string>

#include "core_test.h"

thread_local std::uint64_t allocations = 0;

// Not inlined: GCC would take malloc and delete, or new and free, for a pair.
[[gnu::noinline]] void* operator new(std::size_t size) {
    ++allocations;
    if (void* const memory = std::malloc(size > 0 ? size : 1)) return memory;
    throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

namespace {

std::atomic<int> failures{0};

std::vector<Test>& tests() {
    static std::vector<Test> all;
    return all;
}

bool passes(const Test& test) {
    failures.store(0);
    try {
        test.run();
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s: threw %s\n", test.name, error.what());
        failures.fetch_add(1);
    }
    std::printf("%s %s\n", failures.load() == 0 ? "ok  " : "FAIL", test.name);
    std::fflush(stdout);  // a forked child would print it again
    return failures.load() == 0;
}

}  // namespace

Test::Test(const char* file, const char* name, void (*run)()) : file(file), name(name), run(run) {
    tests().push_back(*this);
}

void check(bool holds, const char* condition, const char* file, int line) {
    if (holds) return;
    failures.fetch_add(1);
    std::fprintf(stderr, "%s:%d: does not hold: %s\n", file, line, condition);
}

int main(int argc, char** argv) {
    const std::string wanted = argc > 1 ? argv[1] : "";
    int passed = 0, failed = 0;
    for (const Test& test : tests()) {
        const std::string file = fs::path(test.file).stem(), name = test.name;
        if (file != wanted && name.find(wanted) == std::string::npos) continue;
        passes(test) ? ++passed : ++failed;
    }
    std::printf("%d passed, %d failed\n", passed, failed);
    return failed == 0 && passed > 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
