"""What a run will cost before it is started: memory, communication, bubbles, time."""
