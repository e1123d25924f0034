"""The WAN lab: sites, links and profiles on one Linux machine. See docs/lab.md."""
