"""Kernels as triples: `<op>/ref.py` is the specification and the XLA form, `tpu.py` and `gpu.py` the
Pallas forms, all with one signature. `dispatch.py` chooses once, at start. Import name:
jaxserve.kernels_pallas. Knows nothing of models, schedulers or requests.
"""
