"""Drop-in layers with the parameter names of the CALM release; no logic beyond calling ops."""
