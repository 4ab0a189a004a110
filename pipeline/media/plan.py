"""Plans which packets must be decoded to get a few frames, from the container's index.

The wanted times are sorted into groups of pictures by the container's index of key frames. Each group is
demuxed (not decoded) from its key frame until decoding times pass the last wanted time: the decoding time
of a packet is never after its presentation time, so no later packet can belong on screen by then. Then
the decoder gets the packets from the key frame to the last one that is wanted, no further, and may leave
out pictures that no other picture refers to, unless they are wanted. Pixels are those of a full decode.

Anything unusual (no time stamps, a group that does not start with a key frame, a frame that does not
come out) is `PlanError`: the caller decodes from the start instead.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

SEEKABLE = frozenset({"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"})
"""Containers (ffmpeg's names) whose index makes a seek exact."""
SKIPPABLE = frozenset({"h264", "hevc", "mpeg4", "mpeg2video", "mpeg1video"})
"""Codecs whose decoder can leave out pictures that no other picture refers to."""
MAX_HELD_BYTES = 16 << 20
"""Packets of a group are kept between look-up and decoding up to this; larger groups are read twice."""


class PlanError(Exception):
    """This video can't be planned: decode it from the start."""


@dataclass
class Group:
    """A run of the decoder: from a key frame to the last wanted packet."""

    seek_ticks: int
    """Where to seek to: the first wanted time. (Not the key frame's time in the index: that is when it
    is decoded, and a seek to before its presentation goes one key frame too far back.)"""
    shown: dict[int, int] = field(default_factory=dict)
    """Wanted tick -> presentation time of the frame on screen then."""
    packets: list[Packet] | None = None
    num_packets: int = 0
    """Packets to feed, counted from the key frame."""


def planned_frames(
    container: InputContainer, stream: VideoStream, wanted: list[int]
) -> Iterator[tuple[int, VideoFrame]]:
    """(wanted tick, its frame) for each of the sorted, distinct `wanted` ticks, in any order.

    Raises:
        PlanError: decode from the start instead; ticks already given are right.
    """
    if container.format.name not in SEEKABLE:
        raise PlanError(f"{container.format.name} has no exact index")
    pending = [*wanted]
    if not len(stream.index_entries):
        container.seek(pending[0], stream=stream)  # Matroska reads its index when first asked to seek
    while pending:
        key = _key_before(stream, pending[-1])
        ticks = [tick for tick in pending if tick >= key]
        if not ticks:
            raise PlanError("wanted before the first key frame")
        group, early = _look_up(container, stream, ticks)
        del pending[len(pending) - len(ticks) :]
        if early:  # on screen before this group's key frame is: they belong to the group before
            group_before, left = _look_up(container, stream, early)
            if left:
                raise PlanError("key frames are not in order of presentation")
            yield from _decode(container, stream, group_before)
        yield from _decode(container, stream, group)


def _key_before(stream: VideoStream, tick: int) -> int:
    """Time in the index of the last key frame that is not after `tick` (the first one if none is)."""
    entries = stream.index_entries
    place = entries.search_timestamp(tick, backward=True, any_frame=False)
    if place < 0:
        place = entries.search_timestamp(tick, backward=False, any_frame=False)
    if place < 0:
        raise PlanError("no index")
    return entries[place].timestamp


def _look_up(container: InputContainer, stream: VideoStream, ticks: list[int]) -> tuple[Group, list[int]]:
    """The group of the first tick, up to the last one; and the ticks that are before it on screen."""
    group, held, keep = Group(ticks[0]), 0, True
    packets: list[Packet] = []
    times: list[int] = []
    for packet in _packets_from(container, stream, ticks[0]):
        if packet.pts is None:
            raise PlanError("packets without times")
        if not times and not packet.is_keyframe:
            raise PlanError("the index does not point at a key frame")
        times.append(packet.pts if not packet.is_discard else _NEVER)
        held += packet.size
        keep = keep and held <= MAX_HELD_BYTES
        if keep:
            packets.append(packet)
        if packet.dts is not None and packet.dts > ticks[-1]:  # Matroska leaves out the first few
            break
    early = [tick for tick in ticks if not times or tick < times[0]]
    for tick in ticks[len(early) :]:
        group.shown[tick] = max(time for time in times if time <= tick and time != _NEVER)
    last = {time: number for number, time in enumerate(times)}
    group.num_packets = max((last[time] + 1 for time in group.shown.values()), default=0)
    group.packets = packets if keep else None
    return group, early


_NEVER = 1 << 62


def _packets_from(container: InputContainer, stream: VideoStream, ticks: int) -> Iterator[Packet]:
    container.seek(ticks, stream=stream, backward=True, any_frame=False)
    for packet in container.demux(stream):
        if packet.size:
            yield packet


def _decode(container: InputContainer, stream: VideoStream, group: Group) -> Iterator[tuple[int, VideoFrame]]:
    """Feed the group's packets, skipping what nobody needs, and give its frames."""
    if not group.shown:
        return
    context = stream.codec_context
    skips = context.codec.name in SKIPPABLE
    targets = set(group.shown.values())
    frames: dict[int, VideoFrame] = {}
    packets = group.packets or _packets_from(container, stream, group.seek_ticks)
    context.flush_buffers()
    for _, packet in zip(range(group.num_packets), packets, strict=False):
        if skips:
            context.skip_frame = "DEFAULT" if packet.pts in targets else "NONREF"
        frames.update((f.pts, f) for f in context.decode(packet) if f.pts in targets)
    if len(frames) < len(targets):
        frames.update((f.pts, f) for f in context.decode(None) if f.pts in targets)
    context.flush_buffers()
    if len(frames) < len(targets):
        raise PlanError("a frame did not come out")
    for tick, time in group.shown.items():
        yield tick, frames[time]
