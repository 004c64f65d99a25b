"""What several kinds of test share: peers (cfsctl, registry), image layouts, tree comparison."""
