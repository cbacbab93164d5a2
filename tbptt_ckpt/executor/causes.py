"""What makes a replay another run than the one it repeats, in words."""

RANDOM = (
    "a random generator stood elsewhere; another thread that draws from torch's generator while "
    "a window runs, or a module that draws depending on what is not in its state, must not"
)
BUFFER = (
    "a buffer was changed in another way; a step may depend on its input, state, weights, buffers "
    "and torch's generators only"
)
FORM = "it acts otherwise where a graph is recorded or outputs are needed; its state must not"
HISTORY = (
    "it depends on how far back the graph of the state reaches, as an inner gradient does that "
    "passes through it; detach the state for what is differentiated within a step"
)
CALLS = (
    "a segment module gives steps other values where its calls are cut otherwise, as a mean, a "
    "normalisation, a convolution or attention over the steps of a call does; let it need no more "
    "of other steps than what its state holds"
)
KEPT_OUTSIDE = (
    "the module keeps something outside of its state, such as a counter or a tensor on self, or "
    "draws from a generator that is not found; put it into the state, or register it as a buffer"
)
