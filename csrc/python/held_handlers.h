// Signals' handlers that are written in Python, held back while something must not be interrupted.
#pragma once

#include <csignal>
#include <map>
#include <set>

#include <pybind11/pybind11.h>

namespace pepr {

// Sets what Python does for a signal, and nothing else. signal.signal alone would also end what
// signal.siginterrupt set, and the handler that a C library has put in front of Python's
// (faulthandler.register). First runs the handlers of what has come: they may raise.
inline void set_python_handler(int number, const pybind11::object& handler) {
    struct sigaction before{};
    const bool is_known = ::sigaction(number, nullptr, &before) == 0;
    pybind11::module_::import("_signal").attr("signal")(number, handler);
    if (is_known) ::sigaction(number, &before, nullptr);
}

// What comes while it lives is handled when the interpreter looks for signals next. Handlers run in
// the main thread only, and elsewhere there is nothing to hold.
class HeldHandlers {
public:
    HeldHandlers() {
        static PyMethodDef receive{"receive", &HeldHandlers::receive, METH_VARARGS, nullptr};
        const auto receiver =
            pybind11::reinterpret_steal<pybind11::object>(PyCFunction_New(&receive, nullptr));
        const auto handler_of = pybind11::module_::import("_signal").attr("getsignal");
        for (int number = 1; number < NSIG; ++number) {
            const pybind11::object handler = handler_of(number);
            if (PyCallable_Check(handler.ptr()) == 0) continue;
            before_[number] = handler;
            set(number, receiver);
        }
    }
    ~HeldHandlers() {
        for (const auto& [number, handler] : before_) set(number, handler);
        for (const int number : received()) PyErr_SetInterruptEx(number);
        received().clear();
    }
    HeldHandlers(const HeldHandlers&) = delete;
    HeldHandlers& operator=(const HeldHandlers&) = delete;

private:
    static std::set<int>& received() {
        static std::set<int> numbers;
        return numbers;
    }
    static PyObject* receive(PyObject*, PyObject* arguments) {
        received().insert(static_cast<int>(PyLong_AsLong(PyTuple_GetItem(arguments, 0))));
        Py_RETURN_NONE;
    }
    // What has just come raises before the handler is set: it is kept, and tried again.
    static void set(int number, const pybind11::object& handler) noexcept {
        for (bool is_set = false; !is_set;) try {
                set_python_handler(number, handler);
                is_set = true;
            } catch (pybind11::error_already_set& error) {
                if (error.matches(PyExc_ValueError)) return;  // this is another thread
                if (error.matches(PyExc_KeyboardInterrupt)) received().insert(SIGINT);
            }
    }

    std::map<int, pybind11::object> before_;
};

}  // namespace pepr
