"""The data listener: endpoints, bodies and errors of the three APIs."""
