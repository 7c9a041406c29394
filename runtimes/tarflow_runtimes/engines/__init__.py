"""Engines run bundles: the protocol they implement, the function that opens one, and the implementations."""
