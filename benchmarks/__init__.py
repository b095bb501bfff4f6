"""What `spt bench` measures, one file per question; each has `measure(quick, report, should_stop)`."""
