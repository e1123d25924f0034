"""What can befall a run. Each fault draws its victims from the world's generator."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from decotrain.control import messages as m
from decotrain.control.member import AskLeave

if TYPE_CHECKING:
    from tests.sim.peer import SimPeer
    from tests.sim.world import World

PEERS_MAX = 8


def strike(world: World, kind: str) -> None:
    world.note("fault", kind)
    _FAULTS[kind](world)


def _victim(world: World) -> SimPeer | None:
    live = world.live()
    return world.draw.choice(live) if live else None


def _pair(world: World) -> tuple[SimPeer, SimPeer] | None:
    live = world.live()
    if len(live) < 2:
        return None
    one, other = world.draw.sample(live, 2)
    return one, other


def kill(world: World) -> None:
    victim = _victim(world)
    if victim is not None:
        world.kill_peer(victim)
        if world.draw.random() < 0.5:
            world.after(world.draw.random() * 2.0, lambda: _again(world, victim.process))


def _again(world: World, process: int) -> None:
    if not world.processes[process].alive:
        world.start_peer(process)


def kill_several(world: World) -> None:
    for _ in range(world.draw.randint(2, 3)):
        kill(world)


def kill_all(world: World) -> None:
    for victim in world.live():
        world.kill_peer(victim)
    for process in range(world.options.peers):
        world.after(world.draw.random() * 2.0, lambda process=process: _again(world, process))


def restart(world: World) -> None:
    """Killed, and back before anybody noticed."""
    victim = _victim(world)
    if victim is not None:
        world.kill_peer(victim)
        world.after(0.01, lambda: _again(world, victim.process))


def stop(world: World) -> None:
    victim = _victim(world)
    if victim is not None:
        victim.stopped = True
        world.after(
            world.draw.choice((0.2, 1.0, 4.0)),
            lambda: victim.resume() if victim.alive and victim.stopped else None,
        )


def kill_coordinator(world: World) -> None:
    if world.coordinator is not None:
        world.kill_coordinator()
        world.after(world.draw.random() * 3.0, world.start_coordinator)


def crash_coordinator(world: World) -> None:
    """While it makes the next view: before the record, after it, or between the sends."""
    world.crash_armed = world.coordinator is not None


def stop_coordinator(world: World) -> None:
    world.coordinator_stopped = True

    def go_on() -> None:
        world.coordinator_stopped = False

    world.after(world.draw.choice((0.5, 2.0)), go_on)


def lose_record(world: World) -> None:
    if world.coordinator is not None:
        world.kill_coordinator()
        world.disk = None
        world.after(world.draw.random() * 2.0, world.start_coordinator)


def break_link(world: World) -> None:
    pair = _pair(world)
    if pair is not None:
        world.links.break_link(pair[0].id, pair[1].id, world.draw.random() * 0.3)


def cut_link(world: World) -> None:
    pair = _pair(world)
    if pair is None:
        return
    one, other = pair
    edge = (min(one.id, other.id), max(one.id, other.id))
    world.links.break_link(*edge, 0.0)
    world.links.cut.add(edge)
    for me, there in ((one, other), (other, one)):
        world.after(
            0.3 + world.draw.random() * 0.5,
            lambda me=me, there=there: (
                me.link(there.id, False) if edge in world.links.cut else None
            ),
        )

    def mend() -> None:
        if edge in world.links.cut:
            world.links.cut.discard(edge)
            world.heal_link(edge)

    world.after(world.draw.choice((0.5, 3.0, 8.0)), mend)


def cut_control(world: World) -> None:
    victim = _victim(world)
    if victim is not None:
        world.control.cut.add(victim.id)
        world.after(
            world.draw.choice((0.5, 2.0, 5.0)), lambda: world.control.cut.discard(victim.id)
        )


def cut_coordinator(world: World) -> None:
    """Nobody hears the coordinator; who was there comes back one by one."""
    for victim in world.live():
        world.control.cut.add(victim.id)
    whole_s = world.draw.choice((1.5, 4.0, 12.0))
    for victim in world.live():
        world.after(
            whole_s + world.draw.random() * 3.0,
            lambda victim=victim: world.control.cut.discard(victim.id),
        )


def partition(world: World) -> None:
    """Some peers lose the coordinator and the others."""
    live = world.live()
    side = [peer for peer in live if world.draw.random() < 0.5]
    for one in side:
        world.control.cut.add(one.id)
        for other in live:
            if other not in side:
                world.links.cut.add((min(one.id, other.id), max(one.id, other.id)))
                world.links.break_link(one.id, other.id, 0.0)

    def mend() -> None:
        for one in side:
            world.control.cut.discard(one.id)
            for other in live:
                edge = (min(one.id, other.id), max(one.id, other.id))
                if edge in world.links.cut:
                    world.links.cut.discard(edge)
                    world.heal_link(edge)

    world.after(world.draw.choice((0.5, 3.0)), mend)


def join(world: World) -> None:
    if len(world.live()) < PEERS_MAX:
        world.start_peer(len(world.processes))


def leave(world: World) -> None:
    victim = _victim(world)
    if victim is not None and not victim.stopped:
        victim.step(AskLeave())


def slow(world: World) -> None:
    victim = _victim(world)
    if victim is not None:
        victim.slow = world.draw.choice((5.0, 30.0))


def slow_up(world: World) -> None:
    """What it sends takes long, what it is sent does not: it has values that the others lack."""
    victim = _victim(world)
    if victim is None:
        return
    bound = (world.options.done_bound_s or 1.0) / world.options.latency_s
    victim.slow_up = max(1.0, bound * world.draw.choice((0.7, 2.5, 5.0)))

    def faster() -> None:
        victim.slow_up = 1.0

    world.after(world.draw.choice((1.0, 3.0, 9.0)), faster)


def kick(world: World) -> None:
    victim = _victim(world)
    if victim is not None:
        data = m.encode(m.Kick("sim", victim.id, "", False, "kicked"))
        world.to_coordinator(b"operator", data)


def replay(world: World) -> None:
    for _ in range(world.draw.randint(1, 6)):
        world.control.replay()


_FAULTS: dict[str, Callable[[World], None]] = {
    fault.__name__: fault
    for fault in (
        kill,
        kill_several,
        kill_all,
        restart,
        stop,
        kill_coordinator,
        crash_coordinator,
        stop_coordinator,
        lose_record,
        break_link,
        cut_link,
        cut_control,
        cut_coordinator,
        partition,
        join,
        leave,
        slow,
        slow_up,
        kick,
        replay,
    )
}
