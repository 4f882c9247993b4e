// Signals' handlers that are written in Python, held back while something must not be interrupted.
#pragma once

#include <csignal>
#include <map>
#include <set>

#include <pybind11/pybind11.h>

namespace pepr {

// What comes while it lives is handled when the interpreter looks for signals next. Handlers run in
// the main thread only, and elsewhere there is nothing to hold.
class HeldHandlers {
public:
    HeldHandlers() : module_(pybind11::module_::import("_signal")) {
        static PyMethodDef receive{"receive", &HeldHandlers::receive, METH_VARARGS, nullptr};
        const auto receiver =
            pybind11::reinterpret_steal<pybind11::object>(PyCFunction_New(&receive, nullptr));
        for (int number = 1; number < NSIG; ++number) {
            const pybind11::object handler = module_.attr("getsignal")(number);
            if (PyCallable_Check(handler.ptr()) == 0) continue;
            before_[number] = handler;
            set(number, receiver);
        }
    }
    ~HeldHandlers() {
        restore();
        for (const int number : received()) ::raise(number);
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
    void restore() noexcept {
        for (const auto& [number, handler] : before_) set(number, handler);
    }
    // What has just come raises before the handler is set: it is kept, and tried again.
    void set(int number, const pybind11::object& handler) noexcept {
        for (bool is_set = false; !is_set;) try {
                module_.attr("signal")(number, handler);
                is_set = true;
            } catch (pybind11::error_already_set& error) {
                if (error.matches(PyExc_ValueError)) return;  // this is another thread
                if (error.matches(PyExc_KeyboardInterrupt)) received().insert(SIGINT);
            }
    }

    const pybind11::module_ module_;
    std::map<int, pybind11::object> before_;
};

}  // namespace pepr
