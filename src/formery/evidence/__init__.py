"""What a paper, a claim, a check and a record are; run them, judge them, report them."""
