"""Rows of activations on disk: row k = (id, JSON metadata, one tensor per name), in shards listed by manifest.json.

For example:

    with ShardWriter(out, job, order=[pair.id for pair in pairs]) as writer:
        for pair in pairs:
            if pair.id not in writer.done:
                writer.append([pair.id], {"shift": z}, [{"behaviour": pair.behaviour}])
    store = ShardStore.open(out)
    store.tensor("shift")                            # (rows, d), in the order of the pairs
    store[10:20].tensor("shift")                     # of ten of them
"""

from steer_plugin.store.manifest import Manifest
from steer_plugin.store.order import Order
from steer_plugin.store.reader import ShardStore
from steer_plugin.store.repair import drop_damaged
from steer_plugin.store.shard import Damage, Kind, Shard
from steer_plugin.store.writer import ShardWriter

__all__ = ["Damage", "Kind", "Manifest", "Order", "Shard", "ShardStore", "ShardWriter", "drop_damaged"]
