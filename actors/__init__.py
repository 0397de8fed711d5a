"""The federation on Ray: thin actors that hold the clients and the server of `fedsim`, and forward.

`actors.runtime.ray_runtime` makes the runtime; `fedsim.simulation` runs the same round loop on it as in one process.
"""
