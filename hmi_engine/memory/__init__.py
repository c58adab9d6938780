"""Where knowledge lives while it is served: open PLOT tables, the window overlay, the adapter arena."""
