"""How much of the daemon each of its users takes: places, requests, and answers not yet read.

An answer that nobody reads is the daemon's memory, and the descriptor in it counts against the
daemon's user (unix(7), ETOOMANYREFS). This lasts until the client reads it or closes its end, also
after the daemon has closed its own. So who has not read an answer keeps its place.
"""

from __future__ import annotations

import fcntl
import select
import socket
import struct
import termios
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from pepr_profiler.daemon_client.protocol import Peer

REFUSALS = {
    "user": "it serves another user",
    "requests": "too many requests",
    "clients": "too many clients",
    "message": "not understood",
    "unread": "answers were not read",
    "silent": "nothing was asked",
    "idle": "no run was registered",
    "descriptors": "no descriptor could be sent",
}
"""Why clients are refused, or left."""

_LOG_S = 60.0  # from one report of refusals to the next
_MOST_LOGGED = 5  # users and reasons in a report
_MOST_KEPT = 1000
_BYTES_PER_REQUEST = 8192  # a longer answer counts as several requests
_REFUSALS_PER_USER, _MOST_REFUSALS = 16, 128  # with a reason in them, unread at a time


@dataclass(frozen=True, kw_only=True)
class Quotas:
    """How much one user, and all together, may use.

    What all together may use is not for the first who come: a user may have as much as is left
    for others. So k users who take all they can get leave a part in k + 1 for the next.
    """

    clients: int = 2048
    clients_per_user: int = 300
    reserved: int = 64  # of all clients; for trusted users
    runs_per_user: int = 300
    silence_s: float = 10.0  # to the first request, and to read an answer
    idle_s: float = 60.0  # without a registered run
    requests_per_s: float = 200.0
    requests_at_once: float = 3000.0  # 300 clients that begin together, with ten requests each
    unread_per_user: int = 64  # answers, and so descriptors
    unread_bytes_per_user: int = 2 << 20
    unread_bytes: int = 32 << 20


@dataclass
class User:
    """A user with clients, or with many requests lately. `tokens`: requests that are still free."""

    tokens: float
    counted_at_s: float
    clients: int = 0  # places that are taken, also by clients that are served no more
    runs: int = 0
    refusals: int = 0  # reasons for a refusal that are unread
    unread: dict[Client, int] = field(default_factory=dict)  # bytes
    held: dict[Client, None] = field(default_factory=dict)  # their requests wait


@dataclass(eq=False)
class Client:
    """A connection. One that has `ended` is kept only because of its unread answer."""

    connection: socket.socket
    peer: Peer
    user: User
    trusted: bool
    since_s: float  # its connection, or its last answer
    greeted: bool = False
    runs: dict[str, int] = field(default_factory=dict)
    uses_lanes: bool = False
    watched: bool = False
    ended: bool = False
    is_refusal: bool = False  # it never had a place


class Places:
    """Counts places, requests and unread answers. Only the daemon's thread calls it."""

    def __init__(self, quotas: Quotas) -> None:
        self._quotas = quotas
        self._users: dict[int, User] = {}
        self._taken = self._refusals = self._unread_bytes = 0
        # Edges, not levels: a socket can be written to long before its last answer is read.
        self._edges = select.epoll()
        self._watched: dict[int, Client] = {}

    def fileno(self) -> int:
        """Readable when `changed` has something."""
        return self._edges.fileno()

    def close(self) -> None:
        self._edges.close()

    # --- places and requests ---

    def user(self, uid: int) -> User:
        """A user, with the requests that are free again by now."""
        now_s, most = time.monotonic(), self._quotas.requests_at_once
        user = self._users.setdefault(uid, User(most, now_s))
        user.tokens = min(
            most, user.tokens + (now_s - user.counted_at_s) * self._quotas.requests_per_s
        )
        user.counted_at_s = now_s
        return user

    def users(self) -> Iterator[User]:
        return iter(self._users.values())

    def forget_users(self) -> None:
        """Forgets who has no clients, and all requests free."""
        now_s = time.monotonic()
        patience_s = self._quotas.requests_at_once / self._quotas.requests_per_s
        for uid, user in list(self._users.items()):
            idle = not (user.clients or user.refusals)
            if idle and now_s - user.counted_at_s > patience_s:
                del self._users[uid]

    def may_ask(self, user: User) -> bool:
        """Takes one of a user's free requests, if there is one."""
        if user.tokens < 1:
            return False
        user.tokens -= 1
        return True

    def has_room(self, uid: int, user: User, *, trusted: bool) -> bool:
        """Whether a user may have one more place. Root may always stop us."""
        if user.clients >= self._quotas.clients_per_user:
            return False
        left = self._quotas.clients - self._taken
        if trusted:
            return left > 0 or uid == 0
        return user.clients < left - min(self._quotas.reserved, self._quotas.clients // 8)

    def enter(self, client: Client) -> None:
        client.user.clients += 1
        self._taken += 1

    def enter_refused(self, client: Client) -> bool:
        """Keeps a connection whose only answer says why there is no place; False if too many."""
        if client.user.refusals >= _REFUSALS_PER_USER or self._refusals >= _MOST_REFUSALS:
            return False
        client.is_refusal = client.ended = True
        client.user.refusals += 1
        self._refusals += 1
        return True

    def leave(self, client: Client) -> None:
        """Closes a connection and frees its place."""
        self._unread_bytes -= client.user.unread.pop(client, 0)
        client.user.held.pop(client, None)
        self.unwatch(client)
        client.connection.close()
        if client.is_refusal:
            client.user.refusals -= 1
            self._refusals -= 1
        else:
            client.user.clients -= 1
            self._taken -= 1

    # --- answers ---

    def sent(self, client: Client, size: int) -> None:
        """Notes an answer; a long one counts as several requests."""
        client.since_s = time.monotonic()
        client.user.tokens -= size // _BYTES_PER_REQUEST
        client.user.unread[client] = size
        self._unread_bytes += size

    def has_read(self, client: Client) -> bool:
        """Whether a client has read its last answer."""
        if client not in client.user.unread:
            return True
        queued = fcntl.ioctl(client.connection, termios.TIOCOUTQ, bytes(4))
        if struct.unpack("i", queued)[0] > 1:  # while the kernel frees an answer it counts as 1
            return False
        self._unread_bytes -= client.user.unread.pop(client)
        return True

    def may_answer(self, client: Client) -> bool:
        """Whether a client has read all, and its user enough, for one more answer."""
        return self.has_read(client) and self._has_space(client)

    def _has_space(self, client: Client) -> bool:
        if not self._is_full(client):
            return True
        for other in list(client.user.unread):
            self.has_read(other)
        return not self._is_full(client)

    def _is_full(self, client: Client) -> bool:
        quotas, unread = self._quotas, client.user.unread
        if not unread:
            return False
        size = sum(unread.values())
        left = quotas.unread_bytes - self._unread_bytes
        return (
            len(unread) >= quotas.unread_per_user
            or size >= quotas.unread_bytes_per_user
            or (size >= left and not client.trusted)
        )

    def hold(self, client: Client) -> None:
        """Lets a client's requests wait until `changed` gives it back."""
        client.user.held[client] = None
        for each in (client, *client.user.unread):
            self.watch(each)

    def release(self, user: User) -> list[Client]:
        """Held clients that may be answered now, the first ones first."""
        free = self._quotas.unread_per_user
        found: list[Client] = []
        for client in list(user.held):
            if not self.has_read(client):
                continue
            if not self._has_space(client) or len(found) >= max(1, free - len(user.unread)):
                break
            del user.held[client]
            found.append(client)
        return found

    def changed(self) -> list[Client]:
        """Clients that may have read something, or closed their ends."""
        found = [self._watched[fd] for fd, _ in self._edges.poll(0) if fd in self._watched]
        for client in found:
            if not client.ended and not client.user.held and self.has_read(client):
                self.unwatch(client)
        return found

    def watch(self, client: Client) -> None:
        if not client.watched:
            fd = client.connection.fileno()
            self._edges.register(fd, select.EPOLLOUT | select.EPOLLET)  # may fail
            self._watched[fd] = client
            client.watched = True

    def unwatch(self, client: Client) -> None:
        if client.watched:
            client.watched = False
            fd = client.connection.fileno()
            del self._watched[fd]
            self._edges.unregister(fd)


class Refusals:
    """Counts refusals by reason, and reports them: the first at once, then once a minute."""

    def __init__(self, log: Callable[[str], None]) -> None:
        self.counts = dict.fromkeys(REFUSALS, 0)
        self._log = log
        self._new: Counter[tuple[int, str]] = Counter()
        self._log_at_s = 0.0

    def note(self, why: str, uid: int) -> None:
        self.counts[why] += 1
        if (uid, why) in self._new or len(self._new) < _MOST_KEPT:
            self._new[uid, why] += 1
        self.report()

    def report(self) -> None:
        """Logs what is new, if it is time to."""
        now_s = time.monotonic()
        if not self._new or now_s < self._log_at_s:
            return
        for (uid, why), count in self._new.most_common(_MOST_LOGGED):
            self._log(f"refused user {uid}, {count} time(s): {REFUSALS[why]}")
        if (others := len(self._new) - _MOST_LOGGED) > 0:
            self._log(f"refused others for {others} more reasons")
        self._new.clear()
        self._log_at_s = now_s + _LOG_S
