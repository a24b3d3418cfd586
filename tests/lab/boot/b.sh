# Nothing to do here.
