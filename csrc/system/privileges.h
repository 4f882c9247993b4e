// Giving up privileges: capabilities, and what setuid programs would gain.
#pragma once

#include <cerrno>
#include <cstdint>
#include <system_error>

#include <linux/capability.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace pepr {

// Drops the capabilities of the calling thread that are not in `mask` (bit n: capability n), from
// both its permitted and its effective set. Capabilities belong to threads: each thread has to drop
// its own. Throws std::system_error.
inline void keep_capabilities(std::uint64_t mask) {
    __user_cap_header_struct header{_LINUX_CAPABILITY_VERSION_3, 0};
    __user_cap_data_struct sets[2]{};
    bool done = ::syscall(SYS_capget, &header, sets) == 0;
    for (int half = 0; half < 2; ++half) {
        sets[half].permitted &= static_cast<std::uint32_t>(mask >> (32 * half));
        sets[half].effective = sets[half].permitted;
        sets[half].inheritable = 0;
    }
    // This drops the ambient ones too: the kernel keeps only those that are inheritable.
    done = done && ::syscall(SYS_capset, &header, sets) == 0;
    if (!done) throw std::system_error(errno, std::generic_category(), "giving up capabilities");
}

// From here on nothing that this thread or its children execute gains a privilege (setuid programs,
// file capabilities). Empties the bounding set too if it is allowed to.
inline void forbid_privileges() {
    for (unsigned long capability = 0; ::prctl(PR_CAPBSET_READ, capability, 0, 0, 0) >= 0;
         ++capability)
        ::prctl(PR_CAPBSET_DROP, capability, 0, 0, 0);
    if (::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0)
        throw std::system_error(errno, std::generic_category(), "PR_SET_NO_NEW_PRIVS");
}

// Sets whether the permitted capabilities survive a change of the user from root.
inline void keep_across_setuid(bool keep) {
    if (::prctl(PR_SET_KEEPCAPS, keep ? 1 : 0, 0, 0, 0) != 0)
        throw std::system_error(errno, std::generic_category(), "PR_SET_KEEPCAPS");
}

}  // namespace pepr
