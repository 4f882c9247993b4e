"""A command's output, passed on through pseudo-terminals and pipes while it is read."""

from __future__ import annotations

# pathlib would delay the child's start by 5 ms.
import errno
import os
import signal
import time
from collections.abc import Callable

TYPE_CHECKING = False  # typing takes 0.5 MB
if TYPE_CHECKING:
    import threading

_CHUNK_BYTES = 64 * 1024
_GRACE_MS = 200
_PATIENCE_S = 1.0
# A dead child has left at most one full pipe: fs.pipe-max-size is 1 MiB unless raised. More comes
# from a descendant that still writes; we do not wait for it.
_LEFTOVER_BYTES = 1024 * 1024
Sink = Callable[[int, bytes, int], None]


class Relay:
    """Passes the child's stdout and stderr on at once, unmodified, and shows them to `sink`.

    `sink(channel, data, t_ns)` gets each chunk after it has been written: `channel` is 1 or 2,
    `t_ns` is when it was read. `before()` is called just before bytes are written, so that a line
    of ours can be taken away. Both run in the channel's thread. The child writes into a pty where
    our descriptor is a terminal, into a pipe elsewhere. If both of our descriptors are one file,
    there is one channel, so that the order of the lines stays. stdin is not touched.

    Limits: output stops when this process is killed by SIGKILL (as with `| tee`). A full-screen
    program that sets the terminal's modes through stdout sets those of the pty.
    """

    def __init__(self, sink: Sink, *, before: Callable[[], None] | None = None) -> None:
        self.warnings: list[dict[str, str]] = []
        self._sink: Sink | None = sink
        self._before = before
        self._wake_fd, self._wake_writer = os.pipe()
        self._channels: list[_Channel] = []
        self._threads: list[threading.Thread] = []
        identity: dict[tuple[int, int], _Channel] = {}
        for fd in (1, 2):
            try:
                stat, inherited = os.fstat(fd), os.get_inheritable(fd)
            except OSError:
                inherited = False
            if not inherited:  # it was closed when we started, or is a file of ours by now
                continue
            channel = identity.get((stat.st_dev, stat.st_ino))
            if channel is None:
                channel = identity[stat.st_dev, stat.st_ino] = _Channel(fd)
                self._channels.append(channel)
            channel.replaces.append(fd)

    def file_actions(self) -> list[tuple[int, int, int]]:
        """What makes the child write into the channels."""
        return [
            (os.POSIX_SPAWN_DUP2, channel.child_fd, fd)
            for channel in self._channels
            for fd in channel.replaces
        ]

    def start(self) -> None:
        """Begin to wait for the child's output. It is done before there is a child: it may fail."""
        import threading

        for channel in self._channels:
            thread = threading.Thread(
                target=self._pump, args=(channel,), name=f"relay-{channel.fd}", daemon=True
            )
            self._threads.append(thread)
            thread.start()

    def leave_ends_to_child(self) -> None:
        """The child holds its ends now: close ours, so that we see when it closes them."""
        for channel in self._channels:
            channel.close_child_end()

    @property
    def finished(self) -> bool:
        """Whether everything that can be passed on has been passed on."""
        return all(channel.done for channel in self._channels)

    def join(self, timeout_s: float = _PATIENCE_S) -> None:
        """Wait until all is passed on, at most `timeout_s` a channel."""
        for thread in self._threads:
            thread.join(timeout_s)

    def wind_up(self) -> None:
        """The child has ended: pass on what it left, but do not wait for its descendants."""
        if self._wake_writer >= 0:
            os.close(self._wake_writer)
            self._wake_writer = -1

    def resize(self) -> bool:
        """Copy the terminal's window size to the stand-ins; whether any changed."""
        changed = [channel.resize() for channel in self._channels]
        return any(changed)

    def close(self) -> None:
        """Close the channels. What a living descendant still writes is passed on by `cat`."""
        self.wind_up()
        for channel in self._channels:
            channel.close_child_end()
            if channel.done and channel.fd_open and not channel.ended:
                channel.hand_over()
        if self.finished:
            os.close(self._wake_fd)
            for channel in self._channels:
                channel.close()

    def _pump(self, channel: _Channel) -> None:
        try:
            self._pass_on(channel)
        except OSError as error:
            channel.close()  # its writer meets SIGPIPE, or EIO at a pty, as it would have
            if error.errno not in (errno.EPIPE, errno.EIO):
                self._warn(
                    "output-lost",
                    f"the child's output could not be passed on: {os.strerror(error.errno or 0)}",
                    "free the place that stdout or stderr goes to",
                )
        channel.done = True
        os.kill(os.getpid(), signal.SIGCHLD)  # supervise waits for signals only

    def _pass_on(self, channel: _Channel) -> None:
        import select

        poller = select.poll()
        poller.register(channel.read_fd, select.POLLIN)
        poller.register(self._wake_fd, select.POLLIN)
        left_bytes: int | None = None  # once the child has ended: how much more we read
        while left_bytes is None or left_bytes > 0:
            ready = poller.poll(None if left_bytes is None else _GRACE_MS)
            if not ready:
                return
            if left_bytes is None and any(fd == self._wake_fd for fd, _ in ready):
                poller.unregister(self._wake_fd)
                left_bytes = _LEFTOVER_BYTES
                continue
            data = channel.read()
            t_ns = time.monotonic_ns()
            if not data:
                channel.ended = True
                return
            if self._before is not None:
                self._before()
            channel.write(data)
            if left_bytes is not None:
                left_bytes -= len(data)
            self._show(channel.fd, data, t_ns)

    def _show(self, fd: int, data: bytes, t_ns: int) -> None:
        if self._sink is None:
            return
        try:
            self._sink(fd, data, t_ns)
        except Exception as error:  # a fault of ours must not cost the child its output
            self._sink = None
            self._warn(
                "output-not-read",
                f"the child's output was passed on but not searched to its end: {error!r}",
                "report this as a bug of pepr-profiler",
            )

    def _warn(self, code: str, text: str, hint: str) -> None:
        self.warnings.append({"code": code, "text": text, "hint": hint})


class _Channel:
    """One stream: what the child writes into, what we read from, and where it goes."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.replaces: list[int] = []
        self.ended = False  # no writer is left
        self.done = False  # its thread has nothing more to do
        self.is_tty = os.isatty(fd)
        if self.is_tty:
            self.read_fd, self.child_fd = os.openpty()
            self._prepare_pty()
        else:
            self.read_fd, self.child_fd = os.pipe()

    @property
    def fd_open(self) -> bool:
        return self.read_fd >= 0

    def _prepare_pty(self) -> None:
        """The terminal's modes and size, but bytes unchanged: it converts newlines itself."""
        import termios

        modes = termios.tcgetattr(self.fd)
        modes[1] &= ~termios.OPOST
        modes[3] &= ~(termios.ECHO | termios.ECHONL)
        termios.tcsetattr(self.child_fd, termios.TCSANOW, modes)
        self.resize()

    def resize(self) -> bool:
        if not self.is_tty or not self.fd_open:
            return False
        import fcntl
        import termios

        try:
            size = fcntl.ioctl(self.fd, termios.TIOCGWINSZ, b"\0" * 8)
            if size == fcntl.ioctl(self.read_fd, termios.TIOCGWINSZ, b"\0" * 8):
                return False
            fcntl.ioctl(self.read_fd, termios.TIOCSWINSZ, size)
        except OSError:  # hung up: there is no size any more
            return False
        return True

    def read(self) -> bytes:
        try:
            return os.read(self.read_fd, _CHUNK_BYTES)
        except OSError as error:
            if error.errno == errno.EIO:  # a pty without a writer
                return b""
            raise

    def write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[os.write(self.fd, rest) :]
            except BlockingIOError:  # another process that shares our stdout made it so
                import select

                poller = select.poll()
                poller.register(self.fd, select.POLLOUT)
                poller.poll()

    def hand_over(self) -> None:
        """Leave a `cat` in our place, so that a daemon that keeps writing meets no closed pipe.

        It ends with the daemon, and holds our stdout open as the daemon itself would have.
        """
        actions = [
            (os.POSIX_SPAWN_DUP2, self.read_fd, 0),
            (os.POSIX_SPAWN_DUP2, self.fd, 1),
            (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
        ]
        try:
            os.posix_spawn(
                "/bin/cat",
                ["cat"],
                {},
                file_actions=actions,
                setsigmask=(),
                setsigdef=(signal.SIGPIPE,),
            )
        except OSError:  # a container without cat: the daemon meets SIGPIPE
            return

    def close_child_end(self) -> None:
        if self.child_fd >= 0:
            os.close(self.child_fd)
            self.child_fd = -1

    def close(self) -> None:
        if self.read_fd >= 0:
            os.close(self.read_fd)
            self.read_fd = -1
