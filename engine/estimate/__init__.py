"""What a model would do on devices that need not be there: memory, traffic and times, counted and compiled.

`count`, `links` and `roofline` are arithmetic on configurations; only `compiled` runs a compiler. Nothing here
touches a device.
"""
