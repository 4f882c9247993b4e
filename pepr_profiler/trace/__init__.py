"""A run on disk: what the profiler records, read back from wherever a crash left it.

A run directory holds
- `run.json` (run_json.py): the facts of the run, and its summary once it has ended;
- `LANE.arrows` and `LANE.tail.arrows` (lane.py, arrow.py): what a sensor's driver read, row by row;
- `events-HOST-PID.jsonl` (events.py): marks and metrics of the programs of the run;
- `processes-HOST-PID.jsonl` (events.py): whose processes were seen, and what they were called.

All times are CLOCK_MONOTONIC, ns.
"""
