"""The accuracy study: sets, methods, the plan of runs, how they are carried out, and what they say."""
