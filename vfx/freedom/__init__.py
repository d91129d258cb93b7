"""Which maps the channels of each feature admit, and the parameters that such a map moves."""

from vfx.freedom.infer import Freedom, MapKind, Member, Normed

__all__ = ["Freedom", "MapKind", "Member", "Normed"]
