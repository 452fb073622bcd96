"""Keys and values of a prefix from which many questions go on, with room behind them for what follows.

(I prefixes, B rows, H heads, L tokens, D width of a head.)
"""

from inspect import signature

from torch import Tensor
from transformers import Cache, DynamicCache, DynamicLayer, LlavaForConditionalGeneration

# What a model's forward and `generate` call it: `past_key_values` in older transformers, refused from 5.40 on.
CACHE = "cache" if "cache" in signature(LlavaForConditionalGeneration.forward).parameters else "past_key_values"


def new_state(model: LlavaForConditionalGeneration) -> DynamicCache:
    """An empty one, which the model fills when it is given as its argument `CACHE`."""
    return DynamicCache(config=model.config.text_config)


class RoomyLayer(DynamicLayer):
    """Writes new keys and values behind the old ones; a `DynamicLayer` copies all of them for every token.

    filled: a layer of I prefixes; index_B: which of them each row goes on from; room: how many tokens can follow
    """

    def __init__(self, filled: DynamicLayer, index_B: Tensor, room: int):
        super().__init__()
        self.is_initialized, self.device = True, filled.keys.device
        self.buffers = [_with_room(part_IHLD, index_B, room) for part_IHLD in (filled.keys, filled.values)]
        self._show(filled.keys.shape[-2])

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Adds (B, H, L, D) keys and values; returns all there are."""
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = new
        self._show(end)
        return self.keys, self.values

    def _show(self, length: int) -> None:
        self.keys, self.values = (buffer[:, :, :length] for buffer in self.buffers)


def _with_room(part_IHLD: Tensor, index_B: Tensor, room: int) -> Tensor:
    _, heads, length, width = part_IHLD.shape
    buffer = part_IHLD.new_empty(len(index_B), heads, length + room, width)
    buffer[:, :, :length] = part_IHLD[index_B.to(part_IHLD.device)]
    return buffer


def spread(state: Cache, index_B: Tensor, room: int) -> Cache:
    """The state of I prefixes as that of B rows, in place; layers of other kinds than `DynamicLayer` grow as they do."""
    for number, layer in enumerate(state.layers):
        if type(layer) is DynamicLayer:
            state.layers[number] = RoomyLayer(layer, index_B, room)
        else:
            layer.batch_select_indices(index_B)
    return state
