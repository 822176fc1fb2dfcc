"""Running and proving: what every package of metazoo shares. Import the module that you need."""
